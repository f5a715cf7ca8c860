// LAMB: Adam's direction, scaled by the trust ratio of param and direction.
#pragma once

#include "rule.h"

namespace fused_optim {
inline namespace FO_INSTRUCTION_SET {

struct Lamb {
  static constexpr const char* kName = "lamb";
  static constexpr int kStateCount = 3;
  static constexpr bool kHasDirection = true;
  static constexpr bool kKeepsDirection = false;
  static constexpr StateField kStates[] = {{"step", true}, {"exp_avg", false}, {"exp_avg_sq", false}};

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, bias_correction, grad_averaging, trust_clip, always_adapt;
  };
  static constexpr HyperField kHyper[] = {{"lr", -1},
                                          {"betas", 0},
                                          {"betas", 1},
                                          {"eps", -1},
                                          {"weight_decay", -1},
                                          {"bias_correction", -1},
                                          {"grad_averaging", -1},
                                          {"trust_clip", -1},
                                          {"always_adapt", -1}};
  static unsigned needs(const Hyper&) { return kNeedsDirectionSq; }

  template <class T>
  struct Scalars {
    T beta1, grad_weight, beta2, one_minus_beta2;
    T inverse_bias_correction1, inverse_sqrt_bias_correction2, eps, weight_decay, step_size;
  };

  template <class T>
  FO_HOST_DEVICE static Scalars<T> prepare(const Hyper& hyper, TensorContext& tensor) {
    double& step = tensor.state[0];
    step = step + 1;
    const bool corrected = hyper.bias_correction != 0;
    const double bias_correction1 = corrected ? one_minus_power(hyper.beta1, step) : 1;
    const double bias_correction2 = corrected ? one_minus_power(hyper.beta2, step) : 1;
    Scalars<T> s;
    s.beta1 = static_cast<T>(hyper.beta1);
    s.grad_weight = static_cast<T>(hyper.grad_averaging != 0 ? 1 - hyper.beta1 : 1);
    s.beta2 = static_cast<T>(hyper.beta2);
    s.one_minus_beta2 = static_cast<T>(1 - hyper.beta2);
    s.inverse_bias_correction1 = static_cast<T>(1 / bias_correction1);
    s.inverse_sqrt_bias_correction2 = static_cast<T>(1 / sqrt(bias_correction2));
    s.eps = static_cast<T>(hyper.eps);
    s.weight_decay = static_cast<T>(hyper.weight_decay * tensor.weight_decay_scale);
    s.step_size = 0;
    return s;
  }

  template <class T>
  FO_HOST_DEVICE static void accumulate(T grad, T* state, const Scalars<T>& s) {
    T& exp_avg = state[0];
    T& exp_avg_sq = state[1];
    exp_avg = s.beta1 * exp_avg + s.grad_weight * grad;
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad;
  }

  template <class T>
  FO_HOST_DEVICE static T direction(T param, const T* state, const Scalars<T>& s) {
    const T exp_avg = state[0];
    const T exp_avg_sq = state[1];
    const T denom = square_root(exp_avg_sq) * s.inverse_sqrt_bias_correction2 + s.eps;
    const T adam = exp_avg * s.inverse_bias_correction1 / denom;
    return s.weight_decay != 0 ? adam + s.weight_decay * param : adam;
  }

  FO_HOST_DEVICE static double scale_direction(const Hyper& hyper, TensorContext& tensor) {
    const bool adapts = tensor.has_trust_ratio &&
                        (hyper.always_adapt != 0 || hyper.weight_decay * tensor.weight_decay_scale != 0);
    const bool zero = !(tensor.param_norm > 0 && tensor.direction_norm > 0);
    double ratio = !adapts || zero ? 1 : tensor.param_norm / tensor.direction_norm;
    if (hyper.trust_clip != 0 && ratio > 1) ratio = 1;
    tensor.trust_ratio = ratio;
    return hyper.lr * tensor.lr_scale * ratio;
  }
};

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
