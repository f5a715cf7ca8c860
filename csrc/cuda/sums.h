// What reduce and prepare share: sums over the threads of a block, and numbers of a step that lie on the
// device.
//
// Every sum has one order: a thread adds the squares of its own elements in float, its warp and block add
// those in double along a fixed tree, and one block adds a row's pieces. There are no floating-point atomics,
// so the bits are the same from run to run, on every GPU, and whatever other rows there are.
#pragma once

#include "cuda/device.h"
#include "cuda/vector.h"

namespace fused_optim {
namespace {

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

FO_DEVICE bool is_finite(float value) { return fabsf(value) < HUGE_VALF; }
FO_DEVICE bool is_finite(double value) { return fabs(value) < HUGE_VAL; }

// Calls f with this thread's of `count` values in memory, in order; kAtOnce of them are asked for together.
template <int kAtOnce, class Value, class F>
FO_DEVICE void for_own(const Value* values, int count, const F& f) {
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < count; first += kAtOnce * kThreads) {
    Value loaded[kAtOnce]{};  // zeros behind the last, which change no sum
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + u * kThreads < count) loaded[u] = values[first + u * kThreads];
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) f(loaded[u]);
  }
}

// A copy of a row or a group, whose words are asked for together. A row's storages and `active` are one of
// them.
template <class Value>
FO_DEVICE Value read_words(const Value& value) {
  static_assert(alignof(Value) == 8, "words");
  Value copy;
  __builtin_memcpy(&copy, __builtin_assume_aligned(&value, alignof(Value)), sizeof copy);
  return copy;
}

// A number that the group holds itself, or that a tensor of the user's does: asked for, and as it lies there.
// To ask for the dtype of one before the next has been asked for would be to wait for each in turn.
FO_DEVICE uint64_t fetch_hyper(const CudaGroup& group, int index) {
  const uint64_t address = group.tensors.address[index];
  const int bytes = address == 0 ? 0 : size_of(group.tensors.dtype[index]);
  uint64_t bits;
  __builtin_memcpy(&bits, &group.hyper.rule[index], sizeof bits);
  if (bytes == 2) bits = *reinterpret_cast<const uint16_t*>(address);
  if (bytes == 4) bits = *reinterpret_cast<const uint32_t*>(address);
  if (bytes == 8) bits = *reinterpret_cast<const uint64_t*>(address);
  return bits;
}

FO_DEVICE double widen_hyper(const CudaGroup& group, int index, uint64_t bits) {
  const DType dtype = group.tensors.address[index] == 0 ? DType::float64 : group.tensors.dtype[index];
  if (dtype == DType::float32) return static_cast<double>(float_of(static_cast<uint32_t>(bits)));
  if (dtype == DType::bfloat16) return static_cast<double>(load(bfloat16{static_cast<uint16_t>(bits)}));
  if (dtype == DType::float16) return static_cast<double>(load(float16{static_cast<uint16_t>(bits)}));
  double number;
  __builtin_memcpy(&number, &bits, sizeof number);
  return number;
}

FO_DEVICE double read_hyper(const CudaGroup& group, int index) {
  return widen_hyper(group, index, fetch_hyper(group, index));
}

FO_DEVICE StepOptions options_of(const CudaStep& step) {
  StepOptions options = step.options;
  if (step.grad_scale != 0)
    options.grad_scale = 1 / static_cast<double>(*reinterpret_cast<const float*>(step.grad_scale));
  return options;
}

}  // namespace
}  // namespace fused_optim
