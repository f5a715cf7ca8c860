// The reduce and prepare phases on the device.
//
// Every sum has one order: a thread adds the squares of its own elements in float, its warp and block add
// those in double along a fixed tree, and one block adds a row's pieces. There are no floating-point atomics,
// so the bits are the same from run to run, on every GPU, and whatever other rows there are.
#include <cstddef>

#include "cuda/device.h"
#include "cuda/vector.h"

namespace fused_optim {
namespace {

constexpr int kVectorsInFlight = 4;

FO_DEVICE Sums combine(const Sums& a, const Sums& b) {
  return {{a.norms.grad_sq + b.norms.grad_sq, maximum(a.norms.grad_max, b.norms.grad_max),
           a.norms.param_sq + b.norms.param_sq, a.norms.decayed_sq + b.norms.decayed_sq,
           a.norms.direction_sq + b.norms.direction_sq},
          a.non_finite > b.non_finite ? a.non_finite : b.non_finite};
}

FO_DEVICE Sums sum_warp(Sums sums) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Sums other{};
    other.norms.grad_sq = __shfl_down_sync(0xffffffffu, sums.norms.grad_sq, distance);
    other.norms.grad_max = __shfl_down_sync(0xffffffffu, sums.norms.grad_max, distance);
    other.norms.param_sq = __shfl_down_sync(0xffffffffu, sums.norms.param_sq, distance);
    other.norms.decayed_sq = __shfl_down_sync(0xffffffffu, sums.norms.decayed_sq, distance);
    other.norms.direction_sq = __shfl_down_sync(0xffffffffu, sums.norms.direction_sq, distance);
    other.non_finite = __shfl_down_sync(0xffffffffu, sums.non_finite, distance);
    sums = combine(sums, other);
  }
  return sums;
}

// The sums of all threads of a block, in its first thread.
FO_DEVICE Sums sum_block(const Sums& own) {
  __shared__ Sums of_warp[kWarpsPerBlock];
  const Sums sums = sum_warp(own);
  const unsigned warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) of_warp[warp] = sums;
  __syncthreads();
  Sums total = of_warp[0];
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarpsPerBlock; ++w) total = combine(total, of_warp[w]);
  }
  return total;
}

// The threads that sum one range together.
struct Team {
  int thread;
  int threads;
};

struct Square {
  double sum;
  double largest;
  bool non_finite;
};

FO_DEVICE bool is_finite(float value) { return fabsf(value) < HUGE_VALF; }
FO_DEVICE bool is_finite(double value) { return fabs(value) < HUGE_VAL; }

// Calls f(element) for this thread's elements of a column, always in the same order: for those of kVectors
// vectors at a time, which are under way together, as long as all of them are whole; then one by one. Where
// vectors lie at no multiple of their size, or end early, elements are asked for.
template <int kVectors, class Numbers, class F>
FO_DEVICE void for_each(const Numbers& numbers, int n, Team team, const F& f) {
  constexpr int N = Numbers::kVector;
  const int apart = team.threads * N;
  int i = team.thread * N;
  if (numbers.aligned) {
    int whole = n / (kVectors * apart);
#pragma unroll 1
    for (; whole > 0; --whole) {
      typename Numbers::Loaded loaded[kVectors];
#pragma unroll
      for (int u = 0; u < kVectors; ++u) loaded[u] = numbers.fetch(i + u * apart);
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
#pragma unroll
        for (int e = 0; e < N; ++e) f(numbers.element(loaded[u], e));
      }
      i += kVectors * apart;
    }
#pragma unroll 1
    for (; kVectors > 1 && n - i >= N; i += apart) {
      const typename Numbers::Loaded loaded = numbers.fetch(i);
#pragma unroll
      for (int e = 0; e < N; ++e) f(numbers.element(loaded, e));
    }
  }
#pragma unroll 1
  for (; i < n; i += apart) {
    typename Numbers::Loaded loaded{};
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (e < n - i) numbers.fetch_element(i, e, loaded);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (e < n - i) f(numbers.element(loaded, e));
    }
  }
}

// Where only squares count, a zero's sign does not.
FO_DEVICE float clamp_for_square(float value, const GradTransform<float>& grad) {
  return quick_clamp(value, grad.min, grad.max);
}
FO_DEVICE double clamp_for_square(double value, const GradTransform<double>& grad) {
  return clamp(value, grad.min, grad.max);
}
FO_DEVICE float largest_of(float largest, float value) { return quick_maximum(largest, fabsf(value)); }
FO_DEVICE double largest_of(double largest, double value) { return maximum(largest, fabs(value)); }

// A thread's sum of squares: in float, and where a square overflowed or was lost to underflow once more in
// double.
template <class T, class Numbers>
FO_DEVICE Square sum_squares(const Numbers& numbers, const GradTransform<T>& grad, int n, Team team) {
  T sum = 0, largest = 0;
  bool non_finite = false;
  for_each<kVectorsInFlight>(numbers, n, team, [&](T element) {
    const T value = clamp_for_square(grad.scale * element, grad);
    non_finite = non_finite | !is_finite(element);
    largest = largest_of(largest, value);
    sum += value * value;
  });
  Square result{static_cast<double>(sum), static_cast<double>(largest), non_finite};
  if constexpr (sizeof(T) == 4) {
    const bool sure = (sum > 1e-20f && sum < 1e30f) || largest == 0 || !is_finite(largest);
    if (!sure) {
      result.sum = 0;
      for_each<1>(numbers, n, team, [&](T element) {
        const double value = static_cast<double>(transform(grad, element));
        result.sum += value * value;
      });
    }
  }
  return result;
}

template <class T, class S>
struct Numbers {
  static constexpr int kVector = 16 / sizeof(S);
  using Loaded = Vector<S, kVector>;
  const S* address;
  bool aligned;

  FO_DEVICE explicit Numbers(uint64_t at) : address(reinterpret_cast<const S*>(at)), aligned(at % 16 == 0) {}
  FO_DEVICE Loaded fetch(int i) const { return load_global<Reuse::soon, Loaded>(address + i); }
  FO_DEVICE void fetch_element(int i, int e, Loaded& loaded) const {
    loaded.put(e, load_global<Reuse::soon, S>(address + i + e));
  }
  FO_DEVICE static T element(const Loaded& loaded, int e) {
    // Of a NaN no bit but that it is one comes into a sum.
    if constexpr (sizeof(T) == 4) return widen<QuickFloat>(loaded.at(e)).value;
    return static_cast<T>(load(loaded.at(e)));
  }
};

// A parameter beside its master weight, or beside the lower half of it.
template <class S, class M>
struct MasterNumbers {
  static constexpr int kVector = 16 / sizeof(M);
  struct Loaded {
    Vector<S, kVector> param;
    Vector<M, kVector> master;
  };
  const S* param;
  const M* master;
  bool aligned;

  FO_DEVICE MasterNumbers(uint64_t param_at, uint64_t master_at)
      : param(reinterpret_cast<const S*>(param_at)),
        master(reinterpret_cast<const M*>(master_at)),
        aligned((param_at | master_at) % 16 == 0) {}
  FO_DEVICE Loaded fetch(int i) const {
    return {load_global<Reuse::soon, Vector<S, kVector>>(param + i),
            load_global<Reuse::soon, Vector<M, kVector>>(master + i)};
  }
  FO_DEVICE void fetch_element(int i, int e, Loaded& loaded) const {
    loaded.param.put(e, load_global<Reuse::soon, S>(param + i + e));
    loaded.master.put(e, load_global<Reuse::soon, M>(master + i + e));
  }
  FO_DEVICE static float element(const Loaded& loaded, int e) {
    return load_whole(loaded.param.at(e), loaded.master.at(e));
  }
};

template <class Numbers>
FO_DEVICE Square sum_masters(const Row& row, const GradTransform<float>& grad, int64_t begin, int n,
                             Team team) {
  const auto first = static_cast<uint64_t>(begin);
  const Numbers numbers(row.address[kParam] + 2 * first,
                        row.address[kMaster] + static_cast<uint64_t>(size_of(row.dtype[kMaster])) * first);
  return sum_squares<float>(numbers, grad, n, team);
}

template <class T, class S>
FO_DEVICE Square sum_numbers(const Row& row, int index, const GradTransform<T>& grad, int64_t begin, int n,
                             Team team) {
  using Column = Numbers<T, S>;
  const Column numbers(row.address[index] + static_cast<uint64_t>(begin) * sizeof(S));
  return sum_squares<T>(numbers, grad, n, team);
}

template <class T>
FO_DEVICE Square sum_column(const Row& row, int index, const GradTransform<T>& grad, int64_t begin, int n,
                            Team team) {
  switch (row.dtype[index]) {
    case DType::float32:
      return sum_numbers<T, float>(row, index, grad, begin, n, team);
    case DType::bfloat16:
      return sum_numbers<T, bfloat16>(row, index, grad, begin, n, team);
    case DType::float16:
      return sum_numbers<T, float16>(row, index, grad, begin, n, team);
    default:
      if constexpr (sizeof(T) == 8) return sum_numbers<T, double>(row, index, grad, begin, n, team);
      return {0, 0, false};
  }
}

template <class T>
FO_DEVICE Square sum_param(const Row& row, int64_t begin, int n, Team team) {
  const GradTransform<T> as_it_is{1, static_cast<T>(-HUGE_VAL), static_cast<T>(HUGE_VAL), 0};
  if constexpr (sizeof(T) == 4) {
    if (row.dtype[kMaster] == DType::remainder) {
      return sum_masters<MasterNumbers<bfloat16, int16_t>>(row, as_it_is, begin, n, team);
    }
    if (row.dtype[kMaster] == DType::float32) {
      return row.dtype[kParam] == DType::bfloat16
                 ? sum_masters<MasterNumbers<bfloat16, float>>(row, as_it_is, begin, n, team)
                 : sum_masters<MasterNumbers<float16, float>>(row, as_it_is, begin, n, team);
    }
  }
  return sum_column<T>(row, kParam, as_it_is, begin, n, team);
}

// A number that the group holds itself, or that a tensor of the user's does.
FO_DEVICE double read_hyper(const CudaGroup& group, int index) {
  const uint64_t address = group.tensors.address[index];
  if (address == 0) return group.hyper.rule[index];
  switch (group.tensors.dtype[index]) {
    case DType::float32:
      return static_cast<double>(*reinterpret_cast<const float*>(address));
    case DType::float64:
      return *reinterpret_cast<const double*>(address);
    case DType::bfloat16:
      return static_cast<double>(load(*reinterpret_cast<const bfloat16*>(address)));
    default:
      return static_cast<double>(load(*reinterpret_cast<const float16*>(address)));
  }
}

template <class Rule>
FO_DEVICE GroupHyper read_group(const CudaGroup& group) {
  GroupHyper hyper = group.hyper;
  constexpr int kCount = static_cast<int>(sizeof(typename Rule::Hyper) / sizeof(double));
#pragma unroll
  for (int i = 0; i < kCount; ++i) hyper.rule[i] = read_hyper(group, i);
  return hyper;
}

// weight_decay_of, without the other numbers of the group.
template <class... R>
FO_DEVICE double read_weight_decay(RuleList<R...>, const Row& row, const CudaGroup& group) {
  int index = 0, rule = 0;
  ((index = rule++ == row.rule ? static_cast<int>(offsetof(typename R::Hyper, weight_decay) / sizeof(double))
                               : index),
   ...);
  return read_hyper(group, index) * row.weight_decay_scale;
}

// Every sum of gradient and parameter that there is, each read once: for the norm of grad + weight_decay *
// param. Elements one by one, in double: few optimizers ask for it.
template <class T>
FO_DEVICE Sums sum_decayed(const Row& row, const GradTransform<T>& grad, int64_t begin, int n, Team team) {
  constexpr int kElementsInFlight = 4;
  const AnyColumn<T> grads(row, kGrad, begin);
  const AnyParamColumns<T> params(row, kParam, begin);
  Sums sums{};
  for (int first = team.thread; first < n; first += kElementsInFlight * team.threads) {
    typename AnyColumn<T>::template Loaded<1> of_grad[kElementsInFlight];
    typename AnyParamColumns<T>::template Loaded<1> of_param[kElementsInFlight];
#pragma unroll
    for (int u = 0; u < kElementsInFlight; ++u) {
      const int i = first + u * team.threads;
      if (i >= n) continue;
      of_grad[u] = grads.template fetch<1>(i, 0);
      of_param[u] = params.template fetch<1>(i, 0);
    }
#pragma unroll
    for (int u = 0; u < kElementsInFlight; ++u) {
      if (first + u * team.threads >= n) continue;
      T element[1], param[1];
      grads.widen(of_grad[u], element);
      params.widen(of_param[u], param);
      const auto own = static_cast<double>(transform(grad, element[0]));
      const auto decayed = static_cast<double>(transform(grad, element[0], param[0]));
      sums.norms.grad_sq += own * own;
      sums.norms.grad_max = maximum(sums.norms.grad_max, own < 0 ? -own : own);
      sums.norms.param_sq += static_cast<double>(param[0]) * static_cast<double>(param[0]);
      sums.norms.decayed_sq += decayed * decayed;
      if (!is_finite(element[0])) sums.non_finite = 1;
    }
  }
  return sums;
}

FO_DEVICE StepOptions options_of(const CudaStep& step) {
  StepOptions options = step.options;
  if (step.grad_scale != 0)
    options.grad_scale = 1 / static_cast<double>(*reinterpret_cast<const float*>(step.grad_scale));
  return options;
}

FO_DEVICE bool found_inf(const CudaStep& step) {
  return step.found_inf != 0 && *reinterpret_cast<const float*>(step.found_inf) != 0;
}

template <class T>
FO_DEVICE Sums sum_range(const Row& row, const CudaGroup& group, const StepOptions& options, int64_t begin,
                         int n, Team team) {
  const unsigned needs = needs_of(row, group.hyper, options);
  auto grad = transform_before_norms<T>(row, group.hyper, options);
  if ((needs & kNeedsDecayedSq) != 0) {
    grad.weight_decay = static_cast<T>(read_weight_decay(Rules{}, row, group));
    return sum_decayed(row, grad, begin, n, team);
  }
  Sums sums{};
  if ((needs & (kNeedsGradSq | kNeedsGradMax | kNeedsFinite)) != 0) {
    const Square square = sum_column<T>(row, kGrad, grad, begin, n, team);
    sums.norms.grad_sq = square.sum;
    sums.norms.grad_max = square.largest;
    sums.non_finite = square.non_finite ? 1 : 0;
  }
  if ((needs & kNeedsParamSq) != 0) sums.norms.param_sq = sum_param<T>(row, begin, n, team).sum;
  return sums;
}

FO_DEVICE Sums sum_range(const Row& row, const CudaGroup& group, const StepOptions& options, int64_t begin,
                         int n, Team team) {
  return computes_in_double(row.dtype[kParam]) ? sum_range<double>(row, group, options, begin, n, team)
                                               : sum_range<float>(row, group, options, begin, n, team);
}

}  // namespace

__global__ void __launch_bounds__(kThreads, 3) reduce_kernel(ReduceTable table, CudaStep step) {
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const StepOptions options = options_of(step);
  if (block < table.piece_count) {
    const Piece piece = table.pieces[block];
    const Row& row = table.rows[piece.row];
    if (!row.active) return;
    const int64_t left = row.numel - piece.begin;
    const int n = left < kChunk ? static_cast<int>(left) : kChunk;
    const Sums sums =
        sum_block(sum_range(row, table.groups[row.group], options, piece.begin, n, {thread, kThreads}));
    if (thread == 0) table.sums[piece.out] = sums;
    return;
  }
  const int index = (block - table.piece_count) * kWarpsPerBlock + thread / kWarp;
  if (index >= table.small_count) return;
  const int32_t r = table.small_rows[index];
  const Row& row = table.rows[r];
  if (!row.active) return;
  const Sums sums = sum_warp(sum_range(row, table.groups[row.group], options, 0, static_cast<int>(row.numel),
                                       {thread % kWarp, kWarp}));
  if (thread % kWarp == 0) table.sums[r] = sums;
}

// One block a row of several pieces.
__global__ void __launch_bounds__(kThreads) total_kernel(const Pieces* pieces, const Row* rows, Sums* sums) {
  const Pieces mine = pieces[blockIdx.x];
  if (!rows[mine.row].active) return;
  Sums own{};
  for (int i = static_cast<int>(threadIdx.x); i < mine.count; i += kThreads)
    own = combine(own, sums[mine.first + i]);
  const Sums total = sum_block(own);
  if (threadIdx.x == 0) sums[mine.row] = total;
}

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
  if (skip || thread >= kPreparedRows || r >= table.row_count || !table.rows[r].active) return;
  const Row& row = table.rows[r];
  const CudaGroup& group = table.groups[row.group];
  const Norms norms = needs_of(row, group.hyper, options) != 0 ? table.sums[r].norms : Norms{};
  MeasuredNorms seen;
  prepare_any(Rules{}, row, group, options, norms, global_norm, table.records[r], seen);
  if (step.measured != 0) {
    auto* out = reinterpret_cast<float*>(step.measured) + 3 * static_cast<int64_t>(r);
    out[0] = static_cast<float>(seen.grad_norm);
    out[1] = static_cast<float>(seen.param_norm);
    out[2] = static_cast<float>(seen.trust_ratio);
  }
}

// The second prepare of rules with a direction: one block a row adds the sums of its tiles.
__global__ void __launch_bounds__(kThreads)
    direction_kernel(const DirectionRow* rows, const TileSums* sums, PrepareTable table, CudaStep step,
                     DirectionPass pass) {
  const DirectionRow mine = rows[blockIdx.x];
  const Row& row = table.rows[mine.row];
  if (table.control->skip != 0 || !row.active) return;
  Sums own{};
#pragma unroll 4
  for (int64_t i = threadIdx.x; pass != DirectionPass::prepare && i < mine.count; i += kThreads) {
    const TileSums of_tile = sums[mine.first + i];
    own.norms.direction_sq += of_tile.direction_sq;
    own.norms.param_sq += of_tile.param_sq;
  }
  Sums total = sum_block(own);
  if (threadIdx.x != 0) return;
  if (pass == DirectionPass::add_up) {
    table.sums[mine.row] = total;
    return;
  }
  if (pass == DirectionPass::prepare) total = table.sums[mine.row];
  MeasuredNorms seen;
  prepare_second_any(Rules{}, row, table.groups[row.group], total.norms, table.records[mine.row], seen);
  if (step.measured != 0) {
    auto* out = reinterpret_cast<float*>(step.measured) + 3 * mine.row;
    out[1] = static_cast<float>(seen.param_norm);
    out[2] = static_cast<float>(seen.trust_ratio);
  }
}

}  // namespace fused_optim
