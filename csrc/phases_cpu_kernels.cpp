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
      break;
  }
}

template <class Rule, class T, int kStates>
void update_tile(T* __restrict param, const T* __restrict grad, T* const (&states)[kStates],
                 const typename Rule::template Scalars<T>& scalars, int64_t n) {
  static_assert(kStates >= 1 && kStates <= 3, "spell out one more __restrict pointer");
  const auto s = scalars;
  T* __restrict state0 = states[0];
  T* __restrict state1 = kStates > 1 ? states[kStates > 1] : nullptr;
  T* __restrict state2 = kStates > 2 ? states[kStates > 2 ? 2 : 0] : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    T state[kStates];
    state[0] = state0[i];
    if constexpr (kStates > 1) state[1] = state1[i];
    if constexpr (kStates > 2) state[2] = state2[i];
    T value = param[i];
    Rule::update(value, s.grad_scale * grad[i], state, s);
    param[i] = value;
    state0[i] = state[0];
    if constexpr (kStates > 1) state1[i] = state[1];
    if constexpr (kStates > 2) state2[i] = state[2];
  }
}

template <class Rule>
constexpr int per_tensor_states() {
  int count = 0;
  for (int i = 0; i < Rule::kStateCount; ++i) count += Rule::kStates[i].per_tensor;
  return count;
}

template <class Rule, class T>
void apply(const Row& row, const ScalarsRecord& record, int64_t begin, int64_t end) {
  constexpr int kFirst = kFirstState + per_tensor_states<Rule>();
  constexpr int kStates = Rule::kStateCount - per_tensor_states<Rule>();
  using Scalars = typename Rule::template Scalars<T>;
  static_assert(sizeof(Scalars) <= kScalarsBytes, "raise kScalarsBytes");
  const Scalars& scalars = *reinterpret_cast<const Scalars*>(record.bytes);
  alignas(64) T scratch[2 + kStates][kTile];
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    T* param = load_tile<T>(row, kParam, i, n, scratch[0]);
    const T* grad = load_tile<T>(row, kGrad, i, n, scratch[1]);
    T* states[kStates];
    for (int k = 0; k < kStates; ++k) states[k] = load_tile<T>(row, kFirst + k, i, n, scratch[2 + k]);
    update_tile<Rule, T, kStates>(param, grad, states, scalars, n);
    store_tile<T>(row, kParam, i, n, param);
    for (int k = 0; k < kStates; ++k) store_tile<T>(row, kFirst + k, i, n, states[k]);
  }
}

template <class... R>
constexpr CpuKernels kernels_of(RuleList<R...>) {
  return {FO_STRINGIFY(FO_CPU_CAPABILITY), {apply<R, float>...}, {apply<R, double>...}};
}

}  // namespace

extern const CpuKernels FO_CONCATENATE(cpu_kernels_, FO_CPU_CAPABILITY) = kernels_of(Rules{});

}  // namespace fused_optim
