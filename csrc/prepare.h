// The prepare phase of one row: norms and hyperparameters in, scalars for the element update out. What is per
// tensor is computed here, once, in double; the same code runs on the host and on the device.
#pragma once

#include "codec.h"
#include "row.h"
#include "rules/all.h"
#include "rules/trust_ratio.h"
#include "storage.h"

namespace fused_optim {

enum class Clip : int32_t { none = 0, global_norm, norm, value };

// What is the same for every row of a step.
struct StepOptions {
  double grad_scale;  // 1 / loss scale
  Clip clip;
  double clip_norm;           // of global_norm and norm; infinity measures and scales nothing
  double clip_min, clip_max;  // of value
  bool finds_inf = false;     // look for gradient elements that are not finite
};

struct GroupHyper {
  double maximize;
  TrustRatio trust;
  double rule[kMaxHyper];
  uint64_t needs;  // Need bits of the rule and of the trust ratio
};

// The hyperparameters of one group that are tensors on the rows' device, by their place in GroupHyper::rule.
// The device reads them at each step, so that a scheduler's change is seen without a copy, and by a replayed
// graph.
struct HyperTensors {
  uint64_t address[kMaxHyper];  // 0: the number in GroupHyper counts
  DType dtype[kMaxHyper];
};

// Sums over one tensor, of the gradient after its sign, the loss scale and clipping by value.
struct Norms {
  double grad_sq;
  double grad_max;
  double param_sq;
  double decayed_sq;
  double direction_sq;
};

// The norms of one tensor as a user may read them after the step; NaN where nobody asked for one.
struct MeasuredNorms {
  double grad_norm;  // clipped, before the trust ratio
  double param_norm;
  double trust_ratio;
};

// What happens to a gradient element before a rule sees it: clamp(scale * grad, min, max) + weight_decay *
// param.
template <class T>
struct GradTransform {
  T scale, min, max, weight_decay;
};

template <class Rule, class T>
struct Record {
  GradTransform<T> grad;
  typename Rule::template Scalars<T> scalars;
};

// Room for the Record of any rule, and the key of the row's random words at this step: see key_of.
struct alignas(64) ScalarsRecord {
  unsigned char bytes[kScalarsBytes];
  uint32_t key;
};

inline namespace FO_INSTRUCTION_SET {

template <class Rule>
constexpr int per_tensor_states() {
  int count = 0;
  for (int i = 0; i < Rule::kStateCount; ++i) count += Rule::kStates[i].per_tensor;
  return count;
}

// The states that a parameter has: without the room for a direction that is kept between two passes.
template <class Rule>
constexpr int parameter_states() {
  return Rule::kStateCount - (Rule::kKeepsDirection ? 1 : 0);
}

template <class T>
FO_HOST_DEVICE inline T clamp(T value, T min, T max) {
  value = value < min ? min : value;  // comparisons let NaN through, fmin and fmax would not
  return value > max ? max : value;
}

template <class T>
FO_HOST_DEVICE inline T transform(const GradTransform<T>& grad, T value) {
  return clamp(grad.scale * value, grad.min, grad.max);
}

// What a rule sees of a gradient element.
template <class T>
FO_HOST_DEVICE inline T transform(const GradTransform<T>& grad, T value, T param) {
  value = transform(grad, value);
  return grad.weight_decay != 0 ? value + grad.weight_decay * param : value;
}

// The norms that are reduced for a row before its prepare.
FO_HOST_DEVICE inline unsigned needs_of(const Row& row, const GroupHyper& group, const StepOptions& options) {
  auto needs = static_cast<unsigned>(group.needs) & ~static_cast<unsigned>(kNeedsDirectionSq);
  if (row.clipped && (options.clip == Clip::global_norm || options.clip == Clip::norm)) needs |= kNeedsGradSq;
  if (options.finds_inf) needs |= kNeedsFinite;
  return needs;
}

// The part of the transform that is known before any norm is; its weight decay is that of kNeedsDecayedSq.
template <class T>
FO_HOST_DEVICE inline GradTransform<T> transform_before_norms(const Row& row, const GroupHyper& group,
                                                              const StepOptions& options) {
  const bool clamped = options.clip == Clip::value && row.clipped;
  return {static_cast<T>(group.maximize != 0 ? -options.grad_scale : options.grad_scale),
          static_cast<T>(clamped ? options.clip_min : -HUGE_VAL),
          static_cast<T>(clamped ? options.clip_max : HUGE_VAL), 0};
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

// The key of a row's random words at this step; after prepare_row, once, since it counts the steps of a row
// whose rule does not. The first per-tensor state of every rule is `step`.
FO_HOST_DEVICE inline uint32_t key_of(const Row& row) {
  if (!row.draws) return 0;
  auto* counter = reinterpret_cast<float*>(row.counter);
  if (counter != nullptr) *counter = *counter + 1;
  const double step = counter != nullptr ? *counter : load_number(row, kFirstState);
  const bool counts = step > -0x1p63 && step < 0x1p63;  // what is no number counts as 0
  return random_key(row.seed, counts ? static_cast<uint32_t>(static_cast<int64_t>(step)) : 0, row.place);
}

template <class Rule>
FO_HOST_DEVICE inline typename Rule::Hyper hyper_of(const GroupHyper& group) {
  static_assert(sizeof(typename Rule::Hyper) <= sizeof group.rule, "raise kMaxHyper");
  typename Rule::Hyper hyper;
  __builtin_memcpy(&hyper, group.rule, sizeof hyper);
  return hyper;
}

// The weight decay of a row, for the norm of grad + weight_decay * param.
template <class... R>
FO_HOST_DEVICE inline double weight_decay_of(RuleList<R...>, const Row& row, const GroupHyper& group) {
  double weight_decay = 0;
  int rule = 0;
  ((weight_decay = rule++ == row.rule ? hyper_of<R>(group).weight_decay : weight_decay), ...);
  return weight_decay * row.weight_decay_scale;
}

template <class Rule, class T>
FO_HOST_DEVICE inline Record<Rule, T> prepare_row(const Row& row, const GroupHyper& group,
                                                  const StepOptions& options, const Norms& norms,
                                                  double global_norm, MeasuredNorms& measured) {
  constexpr int kPerTensor = per_tensor_states<Rule>();
  static_assert(kPerTensor <= kMaxPerTensorStates && Rule::kStateCount <= kMaxStates, "raise the limit");
  static_assert(sizeof(Record<Rule, T>) <= kScalarsBytes, "raise kScalarsBytes");
  const double coefficient = clip_coefficient(row, options, norms, global_norm);
  auto hyper = hyper_of<Rule>(group);
  TensorContext tensor{};
  tensor.lr_scale = row.lr_scale;
  tensor.weight_decay_scale = row.weight_decay_scale;
  tensor.grad_norm = coefficient * sqrt(norms.grad_sq);
  tensor.grad_max = coefficient * norms.grad_max;
  tensor.param_norm = sqrt(norms.param_sq);
  tensor.has_trust_ratio = row.has_trust_ratio;
  tensor.grad_scale = 1;
  tensor.trust_ratio = 1;
  const unsigned needs = needs_of(row, group, options);
  measured.grad_norm = (needs & kNeedsGradSq) != 0 ? tensor.grad_norm : NAN;
  measured.param_norm = (needs & kNeedsParamSq) != 0 ? tensor.param_norm : NAN;
  apply_trust_ratio(group.trust, hyper.lr, hyper.weight_decay, sqrt(norms.decayed_sq), tensor);
  for (int i = 0; i < kPerTensor; ++i) tensor.state[i] = load_number(row, kFirstState + i);
  Record<Rule, T> record;
  record.scalars = Rule::template prepare<T>(hyper, tensor);
  for (int i = 0; i < kPerTensor; ++i) store_number(row, kFirstState + i, tensor.state[i]);
  measured.trust_ratio = tensor.trust_ratio;
  record.grad = transform_before_norms<T>(row, group, options);
  const double sign = group.maximize != 0 ? -1 : 1;
  record.grad.scale = static_cast<T>(coefficient * (sign * options.grad_scale) * tensor.grad_scale);
  record.grad.weight_decay = static_cast<T>(tensor.coupled_weight_decay);
  if (tensor.grad_scale != 1 && options.clip == Clip::value && row.clipped) {
    record.grad.min = static_cast<T>(options.clip_min * tensor.grad_scale);
    record.grad.max = static_cast<T>(options.clip_max * tensor.grad_scale);
  }
  return record;
}

// The second prepare of a rule with a direction: its step size, from the norms of the first pass.
template <class Rule, class T>
FO_HOST_DEVICE inline void prepare_direction(const Row& row, const GroupHyper& group, const Norms& norms,
                                             Record<Rule, T>& record, MeasuredNorms& measured) {
  if constexpr (!Rule::kKeepsDirection) {
    TensorContext tensor{};
    tensor.lr_scale = row.lr_scale;
    tensor.weight_decay_scale = row.weight_decay_scale;
    tensor.param_norm = sqrt(norms.param_sq);
    tensor.direction_norm = sqrt(norms.direction_sq);
    tensor.has_trust_ratio = row.has_trust_ratio;
    record.scalars.step_size = static_cast<T>(Rule::scale_direction(hyper_of<Rule>(group), tensor));
    measured.param_norm = tensor.param_norm;
    measured.trust_ratio = tensor.trust_ratio;
  }
}

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
