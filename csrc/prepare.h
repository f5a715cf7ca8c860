// The prepare phase of one row: norms and hyperparameters in, scalars for the element update out. What is per
// tensor is computed here, once, in double; the same code runs on the host and on the device.
#pragma once

#include "row.h"
#include "rules/all.h"
#include "storage.h"

namespace fused_optim {

enum class Clip : int32_t { none = 0, global_norm, norm, value };

// What is the same for every row of a step.
struct StepOptions {
  double grad_scale;  // 1 / loss scale
  Clip clip;
  double clip_norm;           // of global_norm and norm; infinity measures and scales nothing
  double clip_min, clip_max;  // of value
};

struct GroupHyper {
  double maximize;
  double rule[kMaxHyper];
};

// Sums over one tensor, of the gradient after its sign, the loss scale and clipping by value.
struct Norms {
  double grad_sq;
  double grad_max;
  double param_sq;
};

// What happens to a gradient element before a rule sees it: clamp(scale * grad, min, max).
template <class T>
struct GradTransform {
  T scale, min, max;
};

template <class Rule, class T>
struct Record {
  GradTransform<T> grad;
  typename Rule::template Scalars<T> scalars;
};

// Room for the Record of any rule.
struct alignas(64) ScalarsRecord {
  unsigned char bytes[kScalarsBytes];
};

inline namespace FO_INSTRUCTION_SET {

template <class Rule>
constexpr int per_tensor_states() {
  int count = 0;
  for (int i = 0; i < Rule::kStateCount; ++i) count += Rule::kStates[i].per_tensor;
  return count;
}

template <class T>
FO_HOST_DEVICE inline T transform(const GradTransform<T>& grad, T value) {
  value = grad.scale * value;
  value = value < grad.min ? grad.min : value;  // comparisons let NaN through, fmin and fmax would not
  return value > grad.max ? grad.max : value;
}

// The part of the transform that is known before any norm is.
template <class T>
FO_HOST_DEVICE inline GradTransform<T> transform_before_norms(const Row& row, const GroupHyper& group,
                                                              const StepOptions& options) {
  const bool clamped = options.clip == Clip::value && row.clipped;
  return {static_cast<T>(group.maximize != 0 ? -options.grad_scale : options.grad_scale),
          static_cast<T>(clamped ? options.clip_min : -HUGE_VAL),
          static_cast<T>(clamped ? options.clip_max : HUGE_VAL)};
}

FO_HOST_DEVICE inline double clip_coefficient(const Row& row, const StepOptions& options, const Norms& norms,
                                              double global_norm) {
  if (!row.clipped || options.clip_norm == HUGE_VAL) return 1;
  if (options.clip == Clip::global_norm) return options.clip_norm / maximum(global_norm, options.clip_norm);
  if (options.clip == Clip::norm) {
    const double norm = sqrt(norms.grad_sq);
    return norm <= options.clip_norm ? 1 : options.clip_norm / norm;  // NaN spreads over the tensor
  }
  return 1;
}

FO_HOST_DEVICE inline double load_number(const Row& row, int index) {
  const void* address = reinterpret_cast<const void*>(row.address[index]);
  return row.dtype[index] == DType::float64 ? *static_cast<const double*>(address)
                                            : *static_cast<const float*>(address);
}

FO_HOST_DEVICE inline void store_number(const Row& row, int index, double value) {
  void* address = reinterpret_cast<void*>(row.address[index]);
  if (row.dtype[index] == DType::float64) {
    *static_cast<double*>(address) = value;
  } else {
    *static_cast<float*>(address) = static_cast<float>(value);
  }
}

template <class Rule, class T>
FO_HOST_DEVICE inline Record<Rule, T> prepare_row(const Row& row, const GroupHyper& group,
                                                  const StepOptions& options, const Norms& norms,
                                                  double global_norm) {
  constexpr int kPerTensor = per_tensor_states<Rule>();
  static_assert(kPerTensor <= kMaxPerTensorStates && Rule::kStateCount <= kMaxStates, "raise the limit");
  static_assert(sizeof(typename Rule::Hyper) <= sizeof group.rule, "raise kMaxHyper");
  static_assert(sizeof(Record<Rule, T>) <= kScalarsBytes, "raise kScalarsBytes");
  const double coefficient = clip_coefficient(row, options, norms, global_norm);
  typename Rule::Hyper hyper;
  __builtin_memcpy(&hyper, group.rule, sizeof hyper);
  TensorContext tensor{row.lr_scale,
                       row.weight_decay_scale,
                       coefficient * sqrt(norms.grad_sq),
                       coefficient * norms.grad_max,
                       sqrt(norms.param_sq),
                       {}};
  for (int i = 0; i < kPerTensor; ++i) tensor.state[i] = load_number(row, kFirstState + i);
  Record<Rule, T> record;
  record.scalars = Rule::template prepare<T>(hyper, tensor);
  for (int i = 0; i < kPerTensor; ++i) store_number(row, kFirstState + i, tensor.state[i]);
  record.grad = transform_before_norms<T>(row, group, options);
  record.grad.scale =
      static_cast<T>(coefficient * (group.maximize != 0 ? -options.grad_scale : options.grad_scale));
  return record;
}

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
