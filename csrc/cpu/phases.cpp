// The CPU backend's driver: which kernels, how many threads, who does which elements.
#include "cpu/phases.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "cpu/threads.h"

namespace fused_optim {
namespace {

// A step of fewer elements is done before a second thread has woken up.
constexpr int64_t kSerialElements = 64 * 1024;
// What a thread takes at a time: small enough to balance, large enough that taking costs nothing.
constexpr int64_t kTaskElements = 128 * 1024;

// One step's rows and numbers, and where its intermediate results go, row by row.
struct CpuStep {
  const CpuKernels& kernels;
  const std::vector<Row>& rows;
  const std::vector<GroupHyper>& groups;
  const StepOptions& options;
  int threads;
  std::vector<Norms>& norms;
  std::vector<ScalarsRecord>& records;
  std::vector<MeasuredNorms>& measured;
  std::atomic<bool>& non_finite;  // set where options.finds_inf asks and an element is not
};

struct Task {
  size_t first_row, last_row;  // rows [first, last)
  int64_t begin, end;          // of the elements, where it is one row
};

struct PrepareFunctions {
  void (*prepare)(const Row&, const GroupHyper&, const StepOptions&, const Norms&, double, ScalarsRecord&,
                  MeasuredNorms&);
  double (*prepare_direction)(const Row&, const GroupHyper&, const Norms&, ScalarsRecord&, MeasuredNorms&);
};

template <class Rule, class T>
constexpr PrepareFunctions prepare_functions_of() {
  PrepareFunctions functions{};
  functions.prepare = [](const Row& row, const GroupHyper& group, const StepOptions& options,
                         const Norms& norms, double global_norm, ScalarsRecord& out,
                         MeasuredNorms& measured) {
    const auto record = prepare_row<Rule, T>(row, group, options, norms, global_norm, measured);
    std::memcpy(out.bytes, &record, sizeof record);
  };
  if constexpr (Rule::kHasDirection) {
    functions.prepare_direction = [](const Row& row, const GroupHyper& group, const Norms& norms,
                                     ScalarsRecord& out, MeasuredNorms& measured) {
      auto& record = *reinterpret_cast<Record<Rule, T>*>(out.bytes);
      prepare_direction<Rule, T>(row, group, norms, record, measured);
      return static_cast<double>(record.scalars.step_size);
    };
  }
  return functions;
}

template <class... R>
const PrepareFunctions& prepare_functions(RuleList<R...>, const Row& row) {
  static constexpr PrepareFunctions in_float[] = {prepare_functions_of<R, float>()...};
  static constexpr PrepareFunctions in_double[] = {prepare_functions_of<R, double>()...};
  return (computes_in_double(row.dtype[kParam]) ? in_double : in_float)[row.rule];
}

template <class... R>
unsigned needs_of(RuleList<R...>, int rule, const GroupHyper& group) {
  unsigned needs = 0;
  int index = 0;
  ((needs = index++ == rule ? R::needs(hyper_of<R>(group)) : needs), ...);
  return needs;
}

template <class... R>
int per_tensor_states_of(RuleList<R...>, int rule) {
  static constexpr int table[] = {per_tensor_states<R>()...};
  return table[rule];
}

int64_t active_elements(const std::vector<Row>& rows) {
  int64_t elements = 0;
  for (const Row& row : rows) elements += row.active ? row.numel : 0;
  return elements;
}

// Large rows in pieces, runs of small rows together. A row's pieces begin at multiples of kTaskElements.
std::vector<Task> split(const std::vector<Row>& rows) {
  std::vector<Task> tasks;
  size_t first = 0;
  int64_t gathered = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    const int64_t numel = rows[r].active ? rows[r].numel : 0;
    if (gathered + numel > kTaskElements && first < r) {
      tasks.push_back({first, r, 0, rows[first].numel});
      first = r;
      gathered = 0;
    }
    if (numel > kTaskElements) {
      for (int64_t begin = 0; begin < numel; begin += kTaskElements) {
        tasks.push_back({r, r + 1, begin, std::min(numel, begin + kTaskElements)});
      }
      first = r + 1;
    } else {
      gathered += numel;
    }
  }
  if (first < rows.size()) tasks.push_back({first, rows.size(), 0, rows[first].numel});
  return tasks;
}

// Calls f(row index, begin, end) for what a task covers.
template <class F>
void for_each_row(const std::vector<Row>& rows, const Task& task, const F& f) {
  for (size_t r = task.first_row; r < task.last_row; ++r) {
    if (!rows[r].active) continue;
    const bool whole = task.last_row - task.first_row > 1;
    f(r, whole ? 0 : task.begin, whole ? rows[r].numel : task.end);
  }
}

const GroupHyper& group_of(const CpuStep& step, size_t r) {
  return step.groups[static_cast<size_t>(step.rows[r].group)];
}

Norms reduce_row(const CpuStep& step, size_t r, int64_t begin, int64_t end) {
  const Row& row = step.rows[r];
  const GroupHyper& group = group_of(step, r);
  const unsigned needs = needs_of(row, group, step.options);
  if (needs == 0) return {};
  auto grad = transform_before_norms<double>(row, group, step.options);
  grad.weight_decay = weight_decay_of(Rules{}, row, group);
  const bool in_double = computes_in_double(row.dtype[kParam]);
  bool non_finite = false;
  const auto reduce = in_double ? step.kernels.reduce_double : step.kernels.reduce_float;
  const Norms norms = reduce(row, grad, needs, begin, end, non_finite);
  if (non_finite) step.non_finite.store(true, std::memory_order_relaxed);
  return norms;
}

bool has_direction(const CpuStep& step, size_t r) {
  return step.kernels.accumulate_float[step.rows[r].rule] != nullptr;
}

Norms accumulate_row(const CpuStep& step, size_t r, int64_t begin, int64_t end, void* directions = nullptr) {
  const Row& row = step.rows[r];
  const bool in_double = computes_in_double(row.dtype[kParam]);
  const auto* table = in_double ? step.kernels.accumulate_double : step.kernels.accumulate_float;
  return table[row.rule](row, step.records[r], begin, end, directions);
}

void apply_row(const CpuStep& step, size_t r, int64_t begin, int64_t end, bool only_states = false) {
  const Row& row = step.rows[r];
  const bool in_double = computes_in_double(row.dtype[kParam]);
  const auto* table = in_double ? step.kernels.apply_double : step.kernels.apply_float;
  table[row.rule](row, step.records[r], begin, end, only_states);
}

void prepare_of(const CpuStep& step, size_t r, double global_norm) {
  const Row& row = step.rows[r];
  prepare_functions(Rules{}, row)
      .prepare(row, group_of(step, r), step.options, step.norms[r], global_norm, step.records[r],
               step.measured[r]);
  step.records[r].key = key_of(row);
}

double prepare_direction_of(const CpuStep& step, size_t r) {
  const Row& row = step.rows[r];
  return prepare_functions(Rules{}, row)
      .prepare_direction(row, group_of(step, r), step.norms[r], step.records[r], step.measured[r]);
}

// Both passes of a row with a direction that one thread takes: the root and the division of every element are
// computed once, their results kept where they are still in the cache.
void apply_direction_of(const CpuStep& step, size_t r) {
  static thread_local std::vector<double> directions;
  const Row& row = step.rows[r];
  const bool in_double = computes_in_double(row.dtype[kParam]);
  const auto needed = static_cast<size_t>(in_double ? row.numel : (row.numel + 1) / 2);
  if (directions.size() < needed) directions.resize(needed);
  step.norms[r] = accumulate_row(step, r, 0, row.numel, directions.data());
  const double step_size = prepare_direction_of(step, r);
  const auto move = in_double ? step.kernels.move_double : step.kernels.move_float;
  move(row, step.records[r], step_size, directions.data());
}

// The sums that `sum(row index, begin, end)` gives for the rows that `takes` names, pieces added in their
// order.
template <class Takes, class Sum>
void sum_over(const CpuStep& step, const std::vector<Task>& tasks, const Takes& takes, const Sum& sum) {
  const std::vector<Row>& rows = step.rows;
  std::vector<Norms> partial(tasks.size());
  const auto job = [&](size_t t) {
    for_each_row(rows, tasks[t], [&](size_t r, int64_t begin, int64_t end) {
      if (!takes(r)) return;
      const Norms norms = sum(r, begin, end);
      (begin == 0 && end == rows[r].numel ? step.norms[r] : partial[t]) = norms;
    });
  };
  run_tasks(job, tasks.size(), active_elements(rows) < kSerialElements ? 1 : step.threads);
  for (size_t t = 0; t < tasks.size(); ++t) {
    const Task& task = tasks[t];
    const size_t r = task.first_row;
    const bool piece = task.last_row - r == 1 && task.end - task.begin < rows[r].numel;
    if (!piece || !takes(r)) continue;
    Norms& total = step.norms[r];
    if (task.begin == 0) total = {};
    total.grad_sq += partial[t].grad_sq;
    total.grad_max = maximum(total.grad_max, partial[t].grad_max);
    total.param_sq += partial[t].param_sq;
    total.decayed_sq += partial[t].decayed_sq;
    total.direction_sq += partial[t].direction_sq;
  }
}

// Between two steps of a training small rows have left the caches: their memory is asked for before they are
// reached. A function that only prefetches is pure to GCC, which drops calls of it: these must not remain
// such.
constexpr size_t kRowsAhead = 4;

__attribute__((always_inline)) inline void ask_for_columns(const std::vector<Row>& rows, size_t r) {
  if (r >= rows.size()) return;
  for (int c = 0; c < kColumns; ++c) __builtin_prefetch(column<char>(rows[r], c));
}

__attribute__((always_inline)) inline void ask_for_state(const std::vector<Row>& rows, size_t r) {
  if (r < rows.size()) __builtin_prefetch(column<char>(rows[r], kFirstState));
}

// A row whose scalars another may have too.
struct Prepared {
  const Row* row;
  size_t index;
  double state_before[kMaxPerTensorStates], state_after[kMaxPerTensorStates];
};

// Of rows in turn, those with equal scales meet in one place; few different ones share it.
constexpr int kPreparedBits = 7;

size_t place_of(const Row& row) {
  uint64_t lr_scale, weight_decay_scale;
  std::memcpy(&lr_scale, &row.lr_scale, sizeof lr_scale);
  std::memcpy(&weight_decay_scale, &row.weight_decay_scale, sizeof weight_decay_scale);
  const uint64_t mixed = (lr_scale ^ (weight_decay_scale >> 7)) * 0x9E3779B97F4A7C15u;
  return static_cast<size_t>(mixed >> (64 - kPreparedBits));
}

// prepare for the active rows that `takes` names. Rows of equal hyperparameters, scales and step have equal
// scalars: nearly always an earlier row has them. Logarithms and exponentials are dearer than the comparison.
template <class Takes>
void prepare_rows(const CpuStep& step, double global_norm, const Takes& takes) {
  const std::vector<Row>& rows = step.rows;
  Prepared prepared[1 << kPreparedBits];
  for (Prepared& entry : prepared) entry.row = nullptr;
  for (size_t r = 0; r < rows.size(); ++r) {
    const Row& row = rows[r];
    if (!row.active || !takes(r)) continue;
    const GroupHyper& group = group_of(step, r);
    const int per_tensor = per_tensor_states_of(Rules{}, row.rule);
    ask_for_state(rows, r + kRowsAhead);
    double state[kMaxPerTensorStates] = {};
    for (int i = 0; i < per_tensor; ++i) state[i] = load_number(row, kFirstState + i);
    Prepared& known = prepared[place_of(row)];
    const Row* before = known.row;
    const bool alike =
        before != nullptr && before->rule == row.rule && before->dtype[kParam] == row.dtype[kParam] &&
        before->lr_scale == row.lr_scale && before->weight_decay_scale == row.weight_decay_scale &&
        before->clipped == row.clipped && std::equal(state, state + per_tensor, known.state_before) &&
        std::memcmp(&step.groups[static_cast<size_t>(before->group)], &group, sizeof group) == 0;
    if (alike) {
      for (int i = 0; i < per_tensor; ++i) store_number(row, kFirstState + i, known.state_after[i]);
      step.records[r] = step.records[known.index];
      step.records[r].key = key_of(row);
      continue;
    }
    prepare_of(step, r, global_norm);
    if (group.needs != 0 || (row.clipped && step.options.clip == Clip::norm)) continue;
    known.row = &row;
    known.index = r;
    std::copy(state, state + per_tensor, known.state_before);
    for (int i = 0; i < per_tensor; ++i) known.state_after[i] = load_number(row, kFirstState + i);
  }
}

// The sum over all active, clipped rows; the split into groups does not change it. exchanged: the norms are
// those of all processes, and a row counts that has its gradient in another one.
double sum_of_squares(const std::vector<Row>& rows, const std::vector<Norms>& norms, bool exchanged) {
  double sum = 0, lost = 0;  // Neumaier's sum: exact enough that the order of the rows does not show
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!(rows[r].active || exchanged) || !rows[r].clipped) continue;
    const double term = norms[r].grad_sq, next = sum + term;
    lost += sum >= term ? (sum - next) + term : (term - next) + sum;
    sum = next;
  }
  return std::isfinite(sum) ? sum + lost : sum;
}

// The norms of every active row.
void reduce_rows(const CpuStep& step) {
  const std::vector<Task> tasks = split(step.rows);
  sum_over(
      step, tasks, [](size_t) { return true; },
      [&](size_t r, int64_t begin, int64_t end) { return reduce_row(step, r, begin, end); });
}

// The step of every active row. exchange: called when the norms of all directions stand in step.norms,
// whether or not there are any; false gives the step up.
void step_rows(const CpuStep& step, bool reduced, double global_norm, const std::function<bool()>& exchange) {
  const std::vector<Row>& rows = step.rows;
  const bool serial = step.threads <= 1 || active_elements(rows) < kSerialElements;
  const auto needs = [&](size_t r) {
    const unsigned reduced_ones = needs_of(rows[r], group_of(step, r), step.options);
    return (reduced ? 0 : reduced_ones) | (has_direction(step, r) ? kNeedsDirectionSq : 0u);
  };
  // Rows that one thread takes through all phases, while their memory is in its cache.
  const auto is_local = [&](size_t r) {
    return !exchange && rows[r].numel <= kTaskElements && needs(r) != 0;
  };
  bool any_norms = false, any_large = false;
  for (size_t r = 0; r < rows.size(); ++r) {
    const bool measures = rows[r].active && needs(r) != 0;
    any_norms = any_norms || measures;
    any_large = any_large || (measures && !is_local(r));
  }
  if (!any_norms && !exchange) {
    prepare_rows(step, global_norm, [](size_t) { return true; });
    if (serial) {
      for (size_t r = 0; r < rows.size(); ++r) {
        ask_for_columns(rows, r + kRowsAhead);
        if (rows[r].active) apply_row(step, r, 0, rows[r].numel);
      }
      return;
    }
    const std::vector<Task> tasks = split(rows);
    run_tasks(
        [&](size_t t) {
          for_each_row(rows, tasks[t], [&](size_t r, int64_t b, int64_t e) { apply_row(step, r, b, e); });
        },
        tasks.size(), step.threads);
    return;
  }
  const std::vector<Task> tasks = split(rows);
  const auto is_shared = [&](size_t r) { return !is_local(r); };
  if (any_large && !reduced) {
    sum_over(step, tasks, is_shared,
             [&](size_t r, int64_t b, int64_t e) { return reduce_row(step, r, b, e); });
  }
  prepare_rows(step, global_norm, is_shared);
  if (any_large) {
    sum_over(
        step, tasks, [&](size_t r) { return is_shared(r) && has_direction(step, r); },
        [&](size_t r, int64_t b, int64_t e) { return accumulate_row(step, r, b, e); });
  }
  if (exchange && !exchange()) return;
  if (any_large) {
    for (size_t r = 0; r < rows.size(); ++r) {
      if (rows[r].active && is_shared(r) && has_direction(step, r)) prepare_direction_of(step, r);
    }
  }
  const auto whole_row = [&](size_t r) {
    if (!reduced) step.norms[r] = reduce_row(step, r, 0, rows[r].numel);
    prepare_of(step, r, global_norm);
    if (has_direction(step, r)) return apply_direction_of(step, r);
    const bool has_read_param = (needs(r) & (kNeedsParamSq | kNeedsDecayedSq)) != 0;
    apply_row(step, r, 0, rows[r].numel, has_read_param);
  };
  const auto job = [&](size_t t) {
    for_each_row(rows, tasks[t], [&](size_t r, int64_t begin, int64_t end) {
      if (is_local(r)) return whole_row(r);
      apply_row(step, r, begin, end);
    });
  };
  run_tasks(job, tasks.size(), serial ? 1 : step.threads);
}

}  // namespace

const CpuKernels* choose_cpu_kernels(const char* requested) {
  const CpuKernels* available[3];
  int count = 0;
  available[count++] = &cpu_kernels_default;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) available[count++] = &cpu_kernels_avx2;
  if (avx2 && avx512) available[count++] = &cpu_kernels_avx512;
#endif
  if (requested == nullptr || *requested == '\0') return available[count - 1];
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(available[i]->capability, requested) == 0) return available[i];
  }
  return nullptr;
}

unsigned needs_of_rule(int rule, const GroupHyper& group) { return needs_of(Rules{}, rule, group); }

CpuPhases::CpuPhases(const CpuKernels& kernels, const std::vector<GroupHyper>& groups, size_t row_count,
                     std::vector<size_t> own)
    : kernels_(kernels),
      groups_(groups),
      own_(std::move(own)),
      own_rows_(own_.size() == row_count ? 0 : row_count),
      norms_(row_count),
      records_(row_count),
      measured_(row_count) {}

void CpuPhases::collect(const std::vector<Row>& rows) {
  rows_ = own_rows_.empty() ? &rows : &own_rows_;
  active_ = reduced_ = false;
  for (const size_t r : own_) {
    if (!own_rows_.empty()) own_rows_[r] = rows[r];
    active_ = active_ || rows[r].active;
  }
}

bool CpuPhases::reduce(const Step& step, double* sum) {
  if (step.exchange) std::fill(norms_.begin(), norms_.end(), Norms{});
  non_finite_ = false;
  reduce_rows(
      {kernels_, *rows_, groups_, step.options, step.threads, norms_, records_, measured_, non_finite_});
  double exchanged = 0;
  if (step.exchange && !step.exchange(&norms_, 0, &exchanged)) return false;
  *sum += exchanged + sum_of_squares(*rows_, norms_, static_cast<bool>(step.exchange));
  reduced_ = true;
  return true;
}

bool CpuPhases::apply(const Step& step) {
  double unused;
  bool good = true;
  std::function<bool()> exchange;
  if (step.exchange) exchange = [&] { return good = step.exchange(&norms_, 0, &unused); };
  if (step.exchange && !reduced_) std::fill(norms_.begin(), norms_.end(), Norms{});
  if (!active_) return !exchange || exchange();
  StepOptions options = step.options;
  options.finds_inf = false;  // that is for reduce() to answer
  step_rows({kernels_, *rows_, groups_, options, step.threads, norms_, records_, measured_, non_finite_},
            reduced_, step.global_norm.value_or(0), exchange);
  return good;
}

void CpuPhases::add_norms(std::vector<RowNorms>* norms) const {
  if (rows_ == nullptr) return;
  for (const size_t r : own_) {
    const Row& row = (*rows_)[r];
    if (row.active && groups_[static_cast<size_t>(row.group)].needs != 0) norms->push_back({r, measured_[r]});
  }
}

}  // namespace fused_optim
