// Adam and AdamW, with and without AMSGrad: torch.optim's mathematics.
#pragma once

#include "rule.h"

namespace fused_optim {
inline namespace FO_INSTRUCTION_SET {

template <bool kAmsgrad>
struct Adam {
  static constexpr const char* kName = kAmsgrad ? "amsgrad" : "adamw";
  static constexpr int kStateCount = kAmsgrad ? 4 : 3;
  static constexpr bool kHasDirection = false;
  static constexpr bool kKeepsDirection = false;
  static constexpr StateField kStates[] = {
      {"step", true}, {"exp_avg", false}, {"exp_avg_sq", false}, {"max_exp_avg_sq", false}};

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, decay_scaling;
  };
  // Which learning rate decoupled weight decay takes: times lr_scale, without it, or once each.
  static constexpr const char* kDecayScaling[] = {"scaled", "base", "double", nullptr};
  static constexpr HyperField kHyper[] = {{"lr", -1},
                                          {"betas", 0},
                                          {"betas", 1},
                                          {"eps", -1},
                                          {"weight_decay", -1},
                                          {"decoupled_weight_decay", -1},
                                          {"decay_scaling", -1, kDecayScaling, true}};

  static unsigned needs(const Hyper&) { return 0; }

  template <class T>
  struct Scalars {
    T decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
    T inverse_sqrt_bias_correction2, eps, step_size;
  };

  template <class T>
  FO_HOST_DEVICE static Scalars<T> prepare(const Hyper& hyper, TensorContext& tensor) {
    double& step = tensor.state[0];
    step = step + 1;
    const double lr = hyper.lr * tensor.lr_scale;
    const double weight_decay = hyper.weight_decay * tensor.weight_decay_scale;
    const bool decoupled = hyper.decoupled_weight_decay != 0;
    const double bias_correction1 = one_minus_power(hyper.beta1, step);
    const double bias_correction2 = one_minus_power(hyper.beta2, step);
    const double scaled_decay = hyper.decay_scaling != 1 ? 1 - lr * weight_decay : 1;
    const double base_decay = hyper.decay_scaling != 0 ? 1 - hyper.lr * weight_decay : 1;
    Scalars<T> s;
    if (!decoupled) tensor.coupled_weight_decay = tensor.coupled_weight_decay + weight_decay;
    s.decay = static_cast<T>(decoupled ? scaled_decay * base_decay : 1);
    s.beta1 = static_cast<T>(hyper.beta1);
    s.one_minus_beta1 = static_cast<T>(1 - hyper.beta1);
    s.beta2 = static_cast<T>(hyper.beta2);
    s.one_minus_beta2 = static_cast<T>(1 - hyper.beta2);
    s.inverse_sqrt_bias_correction2 = static_cast<T>(1 / sqrt(bias_correction2));
    s.eps = static_cast<T>(hyper.eps);
    s.step_size = static_cast<T>(lr / bias_correction1);
    return s;
  }

  template <class T>
  FO_HOST_DEVICE static void update(T& param, T grad, T* state, const Scalars<T>& s) {
    T& exp_avg = state[0];
    T& exp_avg_sq = state[1];
    param = param * s.decay;
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad;
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad;
    T second_moment = exp_avg_sq;
    if constexpr (kAmsgrad) {
      T& max_exp_avg_sq = state[2];
      max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
      second_moment = max_exp_avg_sq;
    }
    const T denom = square_root(second_moment) * s.inverse_sqrt_bias_correction2 + s.eps;
    param = param - s.step_size * exp_avg / denom;
  }
};

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
