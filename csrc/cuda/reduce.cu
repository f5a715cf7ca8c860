// The reduce phase on the device: norms, and whether all elements are finite.
#include <cstddef>

#include "cuda/drawn_columns.h"
#include "cuda/sums.h"

namespace fused_optim {
namespace {

constexpr int kVectorsInFlight = 4;

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

// A thread's sum of squares: of each chunk in float, and where a square overflowed or was lost to underflow
// once more in double.
template <class T, class Numbers>
FO_DEVICE Square sum_squares(Numbers numbers, const GradTransform<T>& grad, int n, Team team) {
  Square result{};
#pragma unroll 1
  for (; n > 0; n -= kChunk, numbers.advance(kChunk)) {
    const int count = n < kChunk ? n : kChunk;
    T sum = 0, largest = 0;
    bool non_finite = false;
    for_each<kVectorsInFlight>(numbers, count, team, [&](T element) {
      const T value = clamp_for_square(grad.scale * element, grad);
      non_finite = non_finite | !is_finite(element);
      largest = largest_of(largest, value);
      sum += value * value;
    });
    auto in_double = static_cast<double>(sum);
    if constexpr (sizeof(T) == 4) {
      const bool sure = (sum > 1e-20f && sum < 1e30f) || largest == 0 || !is_finite(largest);
      if (!sure) {
        in_double = 0;
        for_each<1>(numbers, count, team, [&](T element) {
          const double value = static_cast<double>(transform(grad, element));
          in_double += value * value;
        });
      }
    }
    result.sum += in_double;
    result.largest = maximum(result.largest, static_cast<double>(largest));
    result.non_finite = result.non_finite | non_finite;
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
  FO_DEVICE void advance(int count) { address += count; }
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

// A parameter beside its master weight, or beside what it lacks of it.
template <class S, class M>
struct MasterNumbers {
  static constexpr int kVector = 16 / (sizeof(M) > sizeof(S) ? sizeof(M) : sizeof(S));
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
  FO_DEVICE void advance(int count) {
    param += count;
    master += count;
  }
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
    if (row.dtype[kMaster] == DType::int8) {
      return sum_masters<MasterNumbers<bfloat16, int8_t>>(row, as_it_is, begin, n, team);
    }
    if (row.dtype[kMaster] == DType::float32) {
      return row.dtype[kParam] == DType::bfloat16
                 ? sum_masters<MasterNumbers<bfloat16, float>>(row, as_it_is, begin, n, team)
                 : sum_masters<MasterNumbers<float16, float>>(row, as_it_is, begin, n, team);
    }
  }
  return sum_column<T>(row, kParam, as_it_is, begin, n, team);
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
  using Grads = AnyColumn<T>;
  using Params = DrawnParamColumns<T>;
  const Grads grads(row, kGrad, begin);
  const Params params(row, kParam, begin);
  Sums sums{};
  for (int first = team.thread; first < n; first += kElementsInFlight * team.threads) {
    typename Grads::template Loaded<1> of_grad[kElementsInFlight];
    typename Params::template Loaded<1> of_param[kElementsInFlight];
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
  if (block < table.piece_count) {
    const Piece piece = table.pieces[block];
    const Row row = read_words(table.rows[piece.row]);
    const CudaGroup& group = table.groups[piece.group];
    const StepOptions options = options_of(step);
    if (!row.active) return;
    const Sums sums = sum_block(sum_range(row, group, options, piece.begin, piece.count, {thread, kThreads}));
    if (thread == 0) table.sums[piece.out] = sums;
    return;
  }
  const int index = (block - table.piece_count) * kWarpsPerBlock + thread / kWarp;
  if (index >= table.small_count) return;
  const Piece piece = table.pieces[table.piece_count + index];
  const Row row = read_words(table.rows[piece.row]);
  const CudaGroup& group = table.groups[piece.group];
  const StepOptions options = options_of(step);
  if (!row.active) return;
  const Sums sums = sum_warp(sum_range(row, group, options, 0, piece.count, {thread % kWarp, kWarp}));
  if (thread % kWarp == 0) table.sums[piece.out] = sums;
}

// One block a row of several pieces.
__global__ void __launch_bounds__(kThreads, 1)
    total_kernel(const Pieces* pieces, const Row* rows, Sums* sums) {
  const Pieces mine = pieces[blockIdx.x];
  const bool active = rows[mine.row].active;
  Sums own{};
  for_own<4>(sums + mine.first, mine.count, [&](const Sums& of_piece) { own = combine(own, of_piece); });
  const Sums total = sum_block(own);
  if (threadIdx.x == 0 && active) sums[mine.row] = total;
}

}  // namespace fused_optim
