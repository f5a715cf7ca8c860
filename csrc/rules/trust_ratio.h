// LARC and LARS: a factor of one tensor's gradient from its norms, composed with any rule.
#pragma once

#include "rule.h"

namespace fused_optim {

// What the factor is where a norm is zero.
enum ZeroNorm { kZeroNormOne = 0, kZeroNormSkip, kZeroNormFloor, kZeroNormRatioOne };
// Where weight decay stands: left to the rule; in the gradient and in the denominator; in the gradient, whose
// norm is then that of the sum.
enum TrustWeightDecay { kDecayOutside = 0, kDecayInRatio, kDecayInNorm };

// Options of a group, all doubles; fused_optim/rule/trust_ratio.py has the same fields in the same order.
struct TrustRatio {
  double coefficient, eps, min_update;
  double clip;          // divide by the learning rate, and at most 1
  double zero_norm;     // ZeroNorm
  double weight_decay;  // TrustWeightDecay
  double always;        // 0: only for tensors with weight decay
  double present;       // 0: no trust ratio in this group
};

inline namespace FO_INSTRUCTION_SET {

// The norms that a trust ratio takes around a rule with these needs: where the decay is in the gradient, the
// rule's norm is that of the sum.
inline unsigned needs_of(const TrustRatio& trust, unsigned rule_needs) {
  if (trust.present == 0) return 0;
  const bool inside = trust.weight_decay != kDecayOutside;
  const bool of_sum = trust.weight_decay == kDecayInNorm || (inside && (rule_needs & kNeedsGradSq) != 0);
  return static_cast<unsigned>(kNeedsParamSq) | kNeedsGradSq | (of_sum ? kNeedsDecayedSq : 0u);
}

// The factor. lr and weight_decay are the tensor's; grad_norm is that of grad + weight_decay * param where
// the decay is in the norm.
FO_HOST_DEVICE inline double trust_ratio(const TrustRatio& trust, double lr, double weight_decay,
                                         double grad_norm, double param_norm) {
  const double decay_norm = trust.weight_decay == kDecayInRatio ? weight_decay * param_norm : 0;
  double ratio = trust.coefficient * param_norm / (grad_norm + decay_norm + trust.eps);
  const bool ratio_one = trust.zero_norm == kZeroNormRatioOne;  // takes a NaN for a zero
  const bool zero = ratio_one ? !(param_norm > 0 && grad_norm > 0) : param_norm == 0 || grad_norm == 0;
  if (ratio_one && zero) ratio = 1;
  if (trust.clip != 0) ratio = ratio / lr;
  if (ratio < trust.min_update) ratio = trust.min_update;
  if (trust.clip != 0 && ratio > 1) ratio = 1;
  if (zero && (trust.zero_norm == kZeroNormOne || trust.zero_norm == kZeroNormSkip)) ratio = 1;
  return ratio;
}

// Applies the factor to what prepare will see; `weight_decay` is the group's, and becomes 0 where the decay
// is inside. decayed_norm: of grad + weight_decay * param.
FO_HOST_DEVICE inline void apply_trust_ratio(const TrustRatio& trust, double group_lr, double& weight_decay,
                                             double decayed_norm, TensorContext& tensor) {
  const double decay = weight_decay * tensor.weight_decay_scale;
  if (trust.present == 0 || !tensor.has_trust_ratio || (trust.always == 0 && decay == 0)) return;
  const bool inside = trust.weight_decay != kDecayOutside;
  const double grad_norm = trust.weight_decay == kDecayInNorm ? decayed_norm : tensor.grad_norm;
  const double ratio = trust_ratio(trust, group_lr * tensor.lr_scale, decay, grad_norm, tensor.param_norm);
  const bool skip = trust.zero_norm == kZeroNormSkip && (tensor.param_norm == 0 || grad_norm == 0);
  double seen_norm = tensor.grad_norm;
  if (inside) {
    weight_decay = 0;
    tensor.coupled_weight_decay = skip ? 0 : decay * ratio;
    if (!skip) seen_norm = decayed_norm;
  }
  tensor.trust_ratio = ratio;
  tensor.grad_scale = ratio;
  tensor.grad_norm = ratio * seen_norm;
  tensor.grad_max = ratio * tensor.grad_max;
}

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
