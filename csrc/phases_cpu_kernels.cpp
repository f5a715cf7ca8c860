// The element loops of the CPU backend; compiled once for each instruction set (FO_CPU_CAPABILITY).
//
// A row is walked in tiles that stay in the first-level cache. A column that lies in memory as the compute
// type is used where it is; any other is widened into a scratch tile and rounded back once. So a rule's loop
// exists once a compute type, whatever the storages, and the compiler vectorises it.
//
// Nothing here may be shared with the other builds: every function is in this build's namespace, and no
// standard container is used.
#include "phases_cpu.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "storage.h"

#define FO_STRINGIFY_(a) #a
#define FO_STRINGIFY(a) FO_STRINGIFY_(a)

namespace fused_optim {
namespace {

constexpr int64_t kTile = 1024;

template <class Storage, class T>
void widen(const Storage* in, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(load(in[i]));
}

template <class Storage, class T>
void narrow(const T* __restrict in, Storage* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(out[i], static_cast<float>(in[i]));
}

// The tile of a column as T: the memory itself, or a widened copy in scratch.
template <class T>
T* load_tile(const Row& row, int index, int64_t begin, int64_t n, T* scratch) {
  switch (row.dtype[index]) {
    case DType::float32:
      if constexpr (sizeof(T) == 4) return column<float>(row, index) + begin;
      widen(column<float>(row, index) + begin, scratch, n);
      return scratch;
    case DType::float64:
      if constexpr (sizeof(T) == 8) return column<double>(row, index) + begin;
      widen(column<double>(row, index) + begin, scratch, n);
      return scratch;
    case DType::bfloat16:
      widen(column<bfloat16>(row, index) + begin, scratch, n);
      return scratch;
    case DType::float16:
      widen(column<float16>(row, index) + begin, scratch, n);
      return scratch;
    case DType::none:
    case DType::remainder:
      break;
  }
  return scratch;
}

// Rounds a scratch tile back to its column; nothing to do where the tile was the memory itself.
template <class T>
void store_tile(const Row& row, int index, int64_t begin, int64_t n, const T* tile) {
  switch (row.dtype[index]) {
    case DType::float32:
      if constexpr (sizeof(T) == 8) narrow(tile, column<float>(row, index) + begin, n);
      break;
    case DType::bfloat16:
      narrow(tile, column<bfloat16>(row, index) + begin, n);
      break;
    case DType::float16:
      narrow(tile, column<float16>(row, index) + begin, n);
      break;
    case DType::float64:
    case DType::none:
    case DType::remainder:
      break;
  }
}

// The tile that a rule updates: the master weight where there is one, otherwise the parameter.
template <class T>
T* load_param(const Row& row, int64_t begin, int64_t n, T* scratch) {
  if (row.dtype[kMaster] == DType::none) return load_tile<T>(row, kParam, begin, n, scratch);
  if (row.dtype[kMaster] != DType::remainder) return load_tile<T>(row, kMaster, begin, n, scratch);
  const bfloat16* param = column<bfloat16>(row, kParam) + begin;
  const int16_t* remainder = column<int16_t>(row, kMaster) + begin;
  for (int64_t i = 0; i < n; ++i) scratch[i] = static_cast<T>(load_split(param[i], remainder[i]));
  return scratch;
}

template <class Storage, class T>
void narrow_ties_away(const T* __restrict in, Storage* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store_ties_away(out[i], static_cast<float>(in[i]));
}

template <class T>
void store_param(const Row& row, int64_t begin, int64_t n, const T* tile) {
  if (row.dtype[kMaster] == DType::none) return store_tile<T>(row, kParam, begin, n, tile);
  if (row.dtype[kMaster] == DType::remainder) {
    bfloat16* param = column<bfloat16>(row, kParam) + begin;
    int16_t* remainder = column<int16_t>(row, kMaster) + begin;
    for (int64_t i = 0; i < n; ++i) store_split(param[i], remainder[i], static_cast<float>(tile[i]));
    return;
  }
  store_tile<T>(row, kMaster, begin, n, tile);
  if (row.dtype[kParam] == DType::bfloat16) narrow_ties_away(tile, column<bfloat16>(row, kParam) + begin, n);
  if (row.dtype[kParam] == DType::float16) narrow_ties_away(tile, column<float16>(row, kParam) + begin, n);
}

template <class Rule, class T, int kStates>
void update_tile(T* __restrict param, const T* __restrict grad, T* const (&states)[kStates],
                 const Record<Rule, T>& record, int64_t n) {
  static_assert(kStates >= 1 && kStates <= 3, "spell out one more __restrict pointer");
  const Record<Rule, T> s = record;
  T* __restrict state0 = states[0];
  T* __restrict state1 = states[kStates > 1 ? 1 : 0];
  T* __restrict state2 = states[kStates > 2 ? 2 : 0];
  for (int64_t i = 0; i < n; ++i) {
    T state[kStates];
    state[0] = state0[i];
    if constexpr (kStates > 1) state[1] = state1[i];
    if constexpr (kStates > 2) state[2] = state2[i];
    T value = param[i];
    Rule::update(value, transform(s.grad, grad[i]), state, s.scalars);
    param[i] = value;
    state0[i] = state[0];
    if constexpr (kStates > 1) state1[i] = state[1];
    if constexpr (kStates > 2) state2[i] = state[2];
  }
}

template <class Rule, class T>
void apply(const Row& row, const ScalarsRecord& record, int64_t begin, int64_t end) {
  constexpr int kFirst = kFirstState + per_tensor_states<Rule>();
  constexpr int kStates = Rule::kStateCount - per_tensor_states<Rule>();
  const auto& scalars = *reinterpret_cast<const Record<Rule, T>*>(record.bytes);
  alignas(64) T scratch[2 + kStates][kTile];
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    T* param = load_param<T>(row, i, n, scratch[0]);
    const T* grad = load_tile<T>(row, kGrad, i, n, scratch[1]);
    T* states[kStates];
    for (int k = 0; k < kStates; ++k) states[k] = load_tile<T>(row, kFirst + k, i, n, scratch[2 + k]);
    update_tile<Rule, T, kStates>(param, grad, states, scalars, n);
    store_param<T>(row, i, n, param);
    for (int k = 0; k < kStates; ++k) store_tile<T>(row, kFirst + k, i, n, states[k]);
  }
}

// Lanes that a sum of squares runs in: a fixed number, so that every instruction set adds in the same order.
constexpr int kLanes = 64;

template <class T, class Sum>
Sum sum_of_squares(const T* __restrict values, const GradTransform<T>& grad, int64_t n) {
  Sum lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const Sum value = static_cast<Sum>(transform(grad, values[i + k]));
      lanes[k] += value * value;
    }
  }
  for (int k = 0; i + k < n; ++k) {
    const Sum value = static_cast<Sum>(transform(grad, values[i + k]));
    lanes[k] += value * value;
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

// In float where that neither overflows nor loses a square to underflow, otherwise again in double.
template <class T>
double sum_tile(const T* values, const GradTransform<T>& grad, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    const float sum = sum_of_squares<float, float>(values, grad, n);
    if (sum > 1e-20f && sum < 1e30f) return static_cast<double>(sum);
  }
  return sum_of_squares<T, double>(values, grad, n);
}

template <class T>
double max_tile(const T* __restrict values, const GradTransform<T>& grad, int64_t n) {
  T largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T value = transform(grad, values[i]);
    largest = maximum(largest, value < 0 ? -value : value);
  }
  return static_cast<double>(largest);
}

template <class T>
Norms reduce(const Row& row, const GradTransform<double>& grad, unsigned needs, int64_t begin, int64_t end) {
  const GradTransform<T> of_grad{static_cast<T>(grad.scale), static_cast<T>(grad.min), static_cast<T>(grad.max)};
  const GradTransform<T> of_param{1, static_cast<T>(-HUGE_VAL), static_cast<T>(HUGE_VAL)};
  alignas(64) T scratch[kTile];
  Norms norms{0, 0, 0};
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    if ((needs & (kNeedsGradSq | kNeedsGradMax)) != 0) {
      const T* values = load_tile<T>(row, kGrad, i, n, scratch);
      if ((needs & kNeedsGradSq) != 0) norms.grad_sq += sum_tile<T>(values, of_grad, n);
      if ((needs & kNeedsGradMax) != 0) norms.grad_max = maximum(norms.grad_max, max_tile<T>(values, of_grad, n));
    }
    if ((needs & kNeedsParamSq) != 0) {
      norms.param_sq += sum_tile<T>(load_param<T>(row, i, n, scratch), of_param, n);
    }
  }
  return norms;
}

template <class... R>
constexpr CpuKernels kernels_of(RuleList<R...>) {
  return {FO_STRINGIFY(FO_CPU_CAPABILITY), {apply<R, float>...}, {apply<R, double>...}, reduce<float>, reduce<double>};
}

}  // namespace

extern const CpuKernels FO_CONCATENATE(cpu_kernels_, FO_CPU_CAPABILITY) = kernels_of(Rules{});

}  // namespace fused_optim
