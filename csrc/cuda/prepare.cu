// The prepare phase on the device: the global norm, and the scalars of each row.
#include "cuda/sums.h"

namespace fused_optim {
namespace {

// A sum that carries what it lost: exact enough that the order of the rows, and so the split into groups,
// does not show in the global norm.
struct Compensated {
  double sum, lost;
};

FO_DEVICE Compensated add(const Compensated& a, double term) {
  const double next = a.sum + term;
  const double lost = a.sum >= term ? (a.sum - next) + term : (term - next) + a.sum;  // both are squares
  return {next, a.lost + lost};
}

FO_DEVICE Compensated add(const Compensated& a, const Compensated& b) {
  return add({a.sum, a.lost + b.lost}, b.sum);
}

// Every block for itself: reading a few numbers a row once more is cheaper than another launch. The result is
// that of all threads together, in the first one. exchanged: the sums are those of all processes, and a row
// counts that has its gradient in another one.
FO_DEVICE void sum_rows(const PrepareTable& table, bool exchanged, double& grad_sq, bool& non_finite) {
  __shared__ Compensated of_warp[kWarpsPerBlock];
  __shared__ int non_finite_of_warp[kWarpsPerBlock];
  Compensated own{0, 0};
  double bad = 0;
#pragma unroll 4
  for (int r = static_cast<int>(threadIdx.x); r < table.row_count; r += kThreads) {
    // Read before anything is asked, so that the loads of several rows are under way at once.
    const bool active = table.rows[r].active, clipped = table.rows[r].clipped;
    const double term = table.sums[r].norms.grad_sq, flag = table.sums[r].non_finite;
    if (active) bad += flag;
    if ((active || exchanged) && clipped) own = add(own, term);
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Compensated other{__shfl_down_sync(0xffffffffu, own.sum, distance),
                            __shfl_down_sync(0xffffffffu, own.lost, distance)};
    own = add(own, other);
    bad += __shfl_down_sync(0xffffffffu, bad, distance);
  }
  const unsigned warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    of_warp[warp] = own;
    non_finite_of_warp[warp] = bad != 0 ? 1 : 0;
  }
  __syncthreads();
  Compensated all = of_warp[0];
  int any = non_finite_of_warp[0];
  for (int w = 1; w < kWarpsPerBlock; ++w) {
    all = add(all, of_warp[w]);
    any |= non_finite_of_warp[w];
  }
  grad_sq = is_finite(all.sum) ? all.sum + all.lost : all.sum;
  non_finite = any != 0;
}

template <class Rule>
FO_DEVICE GroupHyper read_group(const CudaGroup& in_table) {
  const CudaGroup group = read_words(in_table);
  GroupHyper hyper = group.hyper;
  constexpr int kCount = static_cast<int>(sizeof(typename Rule::Hyper) / sizeof(double));
  uint64_t bits[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits[i] = fetch_hyper(group, i);
#pragma unroll
  for (int i = 0; i < kCount; ++i) hyper.rule[i] = widen_hyper(group, i, bits[i]);
  return hyper;
}

FO_DEVICE bool found_inf(const CudaStep& step) {
  return step.found_inf != 0 && *reinterpret_cast<const float*>(step.found_inf) != 0;
}

// A record of the compute type, from one in double: prepare rounds every number once, at its end.
template <class Rule>
FO_DEVICE void put_record(const Record<Rule, double>& record, bool in_double, ScalarsRecord& out) {
  static_assert(sizeof(Record<Rule, double>) == 2 * sizeof(Record<Rule, float>),
                "a record holds numbers only");
  constexpr int kCount = static_cast<int>(sizeof record / sizeof(double));
  double numbers[kCount];
  __builtin_memcpy(numbers, &record, sizeof record);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (in_double) {
      reinterpret_cast<double*>(out.bytes)[i] = numbers[i];
    } else {
      reinterpret_cast<float*>(out.bytes)[i] = static_cast<float>(numbers[i]);
    }
  }
}

template <class Rule>
FO_DEVICE void prepare(const Row& row, const CudaGroup& group, const StepOptions& options, const Norms& norms,
                       double global_norm, ScalarsRecord& out, MeasuredNorms& measured) {
  const GroupHyper hyper = read_group<Rule>(group);
  const auto record = prepare_row<Rule, double>(row, hyper, options, norms, global_norm, measured);
  put_record<Rule>(record, computes_in_double(row.dtype[kParam]), out);
}

template <class... R>
FO_DEVICE void prepare_any(RuleList<R...>, const Row& row, const CudaGroup& group, const StepOptions& options,
                           const Norms& norms, double global_norm, ScalarsRecord& out,
                           MeasuredNorms& measured) {
  int i = 0;
  ((i++ == row.rule ? prepare<R>(row, group, options, norms, global_norm, out, measured) : void()), ...);
}

template <class Rule>
FO_DEVICE void prepare_second(const Row& row, const CudaGroup& group, const Norms& norms, ScalarsRecord& out,
                              MeasuredNorms& measured) {
  if constexpr (Rule::kHasDirection) {
    const GroupHyper hyper = read_group<Rule>(group);
    if (computes_in_double(row.dtype[kParam])) {
      prepare_direction<Rule, double>(row, hyper, norms, *reinterpret_cast<Record<Rule, double>*>(out.bytes),
                                      measured);
    } else {
      prepare_direction<Rule, float>(row, hyper, norms, *reinterpret_cast<Record<Rule, float>*>(out.bytes),
                                     measured);
    }
  }
}

template <class... R>
FO_DEVICE void prepare_second_any(RuleList<R...>, const Row& row, const CudaGroup& group, const Norms& norms,
                                  ScalarsRecord& out, MeasuredNorms& measured) {
  int i = 0;
  ((i++ == row.rule ? prepare_second<R>(row, group, norms, out, measured) : void()), ...);
}

}  // namespace

// For a caller that wants to know before the step goes on.
__global__ void __launch_bounds__(kThreads) grad_sq_kernel(PrepareTable table, uint64_t non_finite_address) {
  double grad_sq = 0;
  bool non_finite = false;
  sum_rows(table, false, grad_sq, non_finite);
  if (threadIdx.x == 0) {
    table.control->grad_sq = grad_sq;
    if (non_finite_address != 0) *reinterpret_cast<float*>(non_finite_address) = non_finite ? 1.0f : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(PrepareTable table, CudaStep step) {
  const StepOptions options = options_of(step);
  double grad_sq = 0;
  bool non_finite = false;
  const bool measured = options.clip == Clip::global_norm || options.clip == Clip::norm;
  if (measured || options.finds_inf) sum_rows(table, step.exchanged != 0, grad_sq, non_finite);
  const bool skip = found_inf(step) || (options.finds_inf && non_finite);
  const double global_norm = step.global_norm_known ? step.global_norm : sqrt(grad_sq);
  const int thread = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0 && thread == 0) {
    table.control->skip = skip ? 1 : 0;
    if (measured && step.grad_norm != 0)
      *reinterpret_cast<float*>(step.grad_norm) = static_cast<float>(global_norm);
    if (step.non_finite != 0) *reinterpret_cast<float*>(step.non_finite) = non_finite ? 1.0f : 0.0f;
  }
  const int r = static_cast<int>(blockIdx.x) * kPreparedRows + thread;
  if (skip || thread >= kPreparedRows || r >= table.row_count) return;
  const Row row = read_words(table.rows[r]);
  if (!row.active) return;
  const CudaGroup& group = table.groups[row.group];
  const Norms norms = needs_of(row, group.hyper, options) != 0 ? table.sums[r].norms : Norms{};
  MeasuredNorms seen;
  prepare_any(Rules{}, row, group, options, norms, global_norm, table.records[r], seen);
  // From the table again: no register holds what only rows that draw need, while prepare_any works.
  table.records[r].key = row.draws ? key_of(read_words(table.rows[r])) : 0;
  if (step.measured != 0) {
    auto* out = reinterpret_cast<float*>(step.measured) + 3 * static_cast<int64_t>(r);
    out[0] = static_cast<float>(seen.grad_norm);
    out[1] = static_cast<float>(seen.param_norm);
    out[2] = static_cast<float>(seen.trust_ratio);
  }
}

// The second prepare of rules with a direction: one block a row adds what the blocks of the first pass have
// summed.
__global__ void __launch_bounds__(kThreads, 1)
    direction_kernel(const DirectionRow* rows, const DirectionSums* sums, PrepareTable table, CudaStep step,
                     DirectionPass pass) {
  const DirectionRow mine = rows[blockIdx.x];
  const Row& row = table.rows[mine.row];
  const bool skip = table.control->skip != 0 || !row.active;
  Sums own{};
  if (pass != DirectionPass::prepare) {
    for_own<16>(sums + mine.first, mine.count, [&](const DirectionSums& of_block) {
      own.norms.direction_sq += of_block.direction_sq;
      own.norms.param_sq += of_block.param_sq;
    });
  }
  Sums total = sum_block(own);
  if (skip || threadIdx.x != 0) return;
  if (pass == DirectionPass::add_up) {
    table.sums[mine.row] = total;
    return;
  }
  if (pass == DirectionPass::prepare) total = table.sums[mine.row];
  MeasuredNorms seen;
  prepare_second_any(Rules{}, row, table.groups[row.group], total.norms, table.records[mine.row], seen);
  if (step.measured != 0) {
    auto* out = reinterpret_cast<float*>(step.measured) + 3 * static_cast<int64_t>(mine.row);
    out[1] = static_cast<float>(seen.param_norm);
    out[2] = static_cast<float>(seen.trust_ratio);
  }
}

}  // namespace fused_optim
