// The reduce and prepare phases on the device.
//
// Every sum has one order: a thread adds the squares of its own elements in float, its warp and block add
// those in double along a fixed tree, and one block adds a row's pieces. There are no floating-point atomics,
// so the bits are the same from run to run, on every GPU, and whatever other rows there are.
#include "tables_cuda.h"
#include "vector_cuda.h"

namespace fused_optim {
namespace {

constexpr int kVectorsInFlight = 4;

FO_DEVICE Sums combine(const Sums& a, const Sums& b) {
  return {{a.norms.grad_sq + b.norms.grad_sq, maximum(a.norms.grad_max, b.norms.grad_max),
           a.norms.param_sq + b.norms.param_sq},
          a.non_finite > b.non_finite ? a.non_finite : b.non_finite};
}

FO_DEVICE Sums sum_warp(Sums sums) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Sums other;
    other.norms.grad_sq = __shfl_down_sync(0xffffffffu, sums.norms.grad_sq, distance);
    other.norms.grad_max = __shfl_down_sync(0xffffffffu, sums.norms.grad_max, distance);
    other.norms.param_sq = __shfl_down_sync(0xffffffffu, sums.norms.param_sq, distance);
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

FO_DEVICE bool is_finite(float value) { return (bits_of(value) & 0x7fffffffu) < 0x7f800000u; }
FO_DEVICE bool is_finite(double value) { return value - value == 0; }

// Calls f(element) for this thread's elements of a column, always in the same order.
template <class Column, int N, class F>
FO_DEVICE void for_each(const Column& column, int n, Team team, const F& f) {
  for (int first = team.thread * N; first < n; first += kVectorsInFlight * team.threads * N) {
    typename Column::Loaded loaded[kVectorsInFlight];
#pragma unroll
    for (int u = 0; u < kVectorsInFlight; ++u) {
      const int i = first + u * team.threads * N;
      loaded[u] = column.fetch(i, n - i);
    }
#pragma unroll
    for (int u = 0; u < kVectorsInFlight; ++u) {
      const int left = n - first - u * team.threads * N;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (e < left) f(column.element(loaded[u], e));
      }
    }
  }
}

// A thread's sum of squares: in float, and where a square overflowed or was lost to underflow once more in
// double.
template <class T, int N, class Column>
FO_DEVICE Square sum_squares(const Column& column, const GradTransform<T>& grad, int n, Team team) {
  T sum = 0, largest = 0;
  bool non_finite = false;
  for_each<Column, N>(column, n, team, [&](T element) {
    const T value = transform(grad, element);
    non_finite = non_finite || !is_finite(element);
    largest = maximum(largest, value < 0 ? -value : value);
    sum += value * value;
  });
  Square result{static_cast<double>(sum), static_cast<double>(largest), non_finite};
  if constexpr (sizeof(T) == 4) {
    const bool sure = (sum > 1e-20f && sum < 1e30f) || largest == 0 || !is_finite(largest);
    if (!sure) {
      result.sum = 0;
      for_each<Column, N>(column, n, team, [&](T element) {
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

  FO_DEVICE explicit Numbers(uint64_t at)
      : address(reinterpret_cast<const S*>(at)), aligned(is_aligned<16>(at)) {}
  FO_DEVICE Loaded fetch(int i, int n) const {
    return load_vector<Reuse::soon, S, kVector>(address, i, n, aligned);
  }
  FO_DEVICE static T element(const Loaded& loaded, int e) { return static_cast<T>(load(loaded.element[e])); }
};

struct SplitNumbers {
  static constexpr int kVector = 8;
  struct Loaded {
    Vector<bfloat16, kVector> upper;
    Vector<int16_t, kVector> lower;
  };
  Numbers<float, bfloat16> param;
  const int16_t* remainder;
  bool aligned;

  FO_DEVICE SplitNumbers(uint64_t param_at, uint64_t remainder_at)
      : param(param_at),
        remainder(reinterpret_cast<const int16_t*>(remainder_at)),
        aligned(is_aligned<16>(remainder_at)) {}
  FO_DEVICE Loaded fetch(int i, int n) const {
    return {param.fetch(i, n), load_vector<Reuse::soon, int16_t, kVector>(remainder, i, n, aligned)};
  }
  FO_DEVICE static float element(const Loaded& loaded, int e) {
    return load_split(loaded.upper.element[e], loaded.lower.element[e]);
  }
};

template <class T, class S>
FO_DEVICE Square sum_numbers(const Row& row, int index, const GradTransform<T>& grad, int64_t begin, int n,
                             Team team) {
  using Column = Numbers<T, S>;
  const Column numbers(row.address[index] + static_cast<uint64_t>(begin) * sizeof(S));
  return sum_squares<T, Column::kVector>(numbers, grad, n, team);
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
  const GradTransform<T> as_it_is{1, static_cast<T>(-HUGE_VAL), static_cast<T>(HUGE_VAL)};
  if constexpr (sizeof(T) == 4) {
    if (row.dtype[kMaster] == DType::remainder) {
      const SplitNumbers numbers(row.address[kParam] + 2 * static_cast<uint64_t>(begin),
                                 row.address[kMaster] + 2 * static_cast<uint64_t>(begin));
      return sum_squares<float, SplitNumbers::kVector>(numbers, as_it_is, n, team);
    }
  }
  const int index = row.dtype[kMaster] == DType::none ? kParam : kMaster;
  return sum_column<T>(row, index, as_it_is, begin, n, team);
}

template <class... R>
FO_DEVICE unsigned needs_on_device(RuleList<R...>, int rule) {
  unsigned needs = 0;
  int i = 0;
  ((needs = i++ == rule ? R::kNeeds : needs), ...);
  return needs;
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
FO_DEVICE Sums sum_range(const Row& row, const GroupHyper& group, const StepOptions& options, int64_t begin,
                         int n, Team team) {
  const bool clip = row.clipped && (options.clip == Clip::global_norm || options.clip == Clip::norm);
  const unsigned needs =
      needs_on_device(Rules{}, row.rule) | (clip ? static_cast<unsigned>(kNeedsGradSq) : 0u);
  Sums sums{};
  if ((needs & (kNeedsGradSq | kNeedsGradMax)) != 0) {
    const auto grad = transform_before_norms<T>(row, group, options);
    const Square square = sum_column<T>(row, kGrad, grad, begin, n, team);
    sums.norms.grad_sq = square.sum;
    sums.norms.grad_max = square.largest;
    sums.non_finite = square.non_finite ? 1 : 0;
  }
  if ((needs & kNeedsParamSq) != 0) sums.norms.param_sq = sum_param<T>(row, begin, n, team).sum;
  return sums;
}

FO_DEVICE Sums sum_range(const Row& row, const GroupHyper& group, const StepOptions& options, int64_t begin,
                         int n, Team team) {
  return computes_in_double(row.dtype[kParam]) ? sum_range<double>(row, group, options, begin, n, team)
                                               : sum_range<float>(row, group, options, begin, n, team);
}

}  // namespace

__global__ void __launch_bounds__(kThreads, 2) reduce_kernel(ReduceTable table, CudaStep step) {
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const StepOptions options = options_of(step);
  if (block < table.piece_count) {
    const Piece piece = table.pieces[block];
    const Row& row = table.rows[piece.row];
    if (!row.active) return;
    const int64_t left = row.numel - piece.begin;
    const int n = left < kChunk ? static_cast<int>(left) : kChunk;
    const Sums sums =
        sum_block(sum_range(row, table.groups[row.group].hyper, options, piece.begin, n, {thread, kThreads}));
    if (thread == 0) table.sums[piece.out] = sums;
    return;
  }
  const int index = (block - table.piece_count) * kWarpsPerBlock + thread / kWarp;
  if (index >= table.small_count) return;
  const int32_t r = table.small_rows[index];
  const Row& row = table.rows[r];
  if (!row.active) return;
  const Sums sums = sum_warp(sum_range(row, table.groups[row.group].hyper, options, 0,
                                       static_cast<int>(row.numel), {thread % kWarp, kWarp}));
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

// Every block for itself: reading a few numbers a row once more is cheaper than another launch.
FO_DEVICE void sum_rows(const PrepareTable& table, double& grad_sq, bool& non_finite) {
  __shared__ Compensated of_thread[kPrepareThreads];
  __shared__ int non_finite_of_thread[kPrepareThreads];
  Compensated own{0, 0};
  bool bad = false;
  for (int r = static_cast<int>(threadIdx.x); r < table.row_count; r += kPrepareThreads) {
    const Row& row = table.rows[r];
    if (!row.active) continue;
    bad = bad || table.sums[r].non_finite != 0;
    if (row.clipped) own = add(own, table.sums[r].norms.grad_sq);
  }
  of_thread[threadIdx.x] = own;
  non_finite_of_thread[threadIdx.x] = bad ? 1 : 0;
  __syncthreads();
  Compensated all = of_thread[0];
  int any = non_finite_of_thread[0];
  for (int t = 1; t < kPrepareThreads; ++t) {
    all = add({all.sum, all.lost + of_thread[t].lost}, of_thread[t].sum);
    any |= non_finite_of_thread[t];
  }
  grad_sq = is_finite(all.sum) ? all.sum + all.lost : all.sum;
  non_finite = any != 0;
}

template <class Rule, class T>
FO_DEVICE void prepare(const Row& row, const CudaGroup& group, const StepOptions& options, const Norms& norms,
                       double global_norm, ScalarsRecord& out) {
  GroupHyper hyper = group.hyper;
  constexpr int kCount = static_cast<int>(sizeof(typename Rule::Hyper) / sizeof(double));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint64_t address = group.tensors.address[i];
    if (address == 0) continue;
    switch (group.tensors.dtype[i]) {
      case DType::float32:
        hyper.rule[i] = static_cast<double>(*reinterpret_cast<const float*>(address));
        break;
      case DType::float64:
        hyper.rule[i] = *reinterpret_cast<const double*>(address);
        break;
      case DType::bfloat16:
        hyper.rule[i] = static_cast<double>(load(*reinterpret_cast<const bfloat16*>(address)));
        break;
      default:
        hyper.rule[i] = static_cast<double>(load(*reinterpret_cast<const float16*>(address)));
    }
  }
  const Record<Rule, T> record = prepare_row<Rule, T>(row, hyper, options, norms, global_norm);
  __builtin_memcpy(out.bytes, &record, sizeof record);
}

template <class... R>
FO_DEVICE void prepare_any(RuleList<R...>, const Row& row, const CudaGroup& group, const StepOptions& options,
                           const Norms& norms, double global_norm, ScalarsRecord& out) {
  const bool in_double = computes_in_double(row.dtype[kParam]);
  int i = 0;
  ((i++ == row.rule ? (in_double ? prepare<R, double>(row, group, options, norms, global_norm, out)
                                 : prepare<R, float>(row, group, options, norms, global_norm, out))
                    : void()),
   ...);
}

}  // namespace

// For a caller that wants to know before the step goes on.
__global__ void __launch_bounds__(kPrepareThreads) grad_sq_kernel(PrepareTable table) {
  double grad_sq = 0;
  bool non_finite = false;
  sum_rows(table, grad_sq, non_finite);
  if (threadIdx.x == 0) table.control->grad_sq = grad_sq;
}

__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(PrepareTable table, CudaStep step) {
  const StepOptions options = options_of(step);
  const bool skip = found_inf(step);
  double grad_sq = 0;
  bool non_finite = false;
  const bool measured = options.clip == Clip::global_norm || options.clip == Clip::norm;
  if (measured) sum_rows(table, grad_sq, non_finite);
  const double global_norm = step.global_norm_known ? step.global_norm : sqrt(grad_sq);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    table.control->skip = skip ? 1 : 0;
    if (measured && step.grad_norm != 0)
      *reinterpret_cast<float*>(step.grad_norm) = static_cast<float>(global_norm);
    if (measured && step.non_finite != 0)
      *reinterpret_cast<float*>(step.non_finite) = non_finite ? 1.0f : 0.0f;
  }
  const int r = static_cast<int>(blockIdx.x * kPrepareThreads + threadIdx.x);
  if (skip || r >= table.row_count || !table.rows[r].active) return;
  const Row& row = table.rows[r];
  prepare_any(Rules{}, row, table.groups[row.group], options, table.sums[r].norms, global_norm,
              table.records[r]);
}

}  // namespace fused_optim
