// NovoGrad: momentum of gradients that are divided by the root of their own norm's second moment. The
// published variants differ in prepare alone.
#pragma once

#include "momentum.h"

namespace fused_optim {
inline namespace FO_INSTRUCTION_SET {

template <bool kAmsgrad>
struct NovoGrad {
  static constexpr const char* kName = kAmsgrad ? "novograd_amsgrad" : "novograd";
  static constexpr int kStateCount = kAmsgrad ? 4 : 3;
  static constexpr bool kHasDirection = false;
  static constexpr bool kKeepsDirection = false;
  static constexpr StateField kStates[] = {{"step", true},
                                           {"exp_avg_sq", true},
                                           {kAmsgrad ? "max_exp_avg_sq" : "exp_avg", kAmsgrad},
                                           {"exp_avg", false}};

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, variant, grad_averaging, bias_correction, init_zero;
    double norm_type, reg_inside_moment, decoupled_decay, weight_decouple, fixed_decay, eps_root;
  };
  enum Variant { kPaper = 0, kOpenSeq2Seq, kApex, kTimm, kKozistr, kOptax, kTfa };
  static constexpr const char* kVariants[] = {"paper",   "openseq2seq", "apex", "timm",
                                              "kozistr", "optax",       "tfa",  nullptr};
  static constexpr HyperField kHyper[] = {{"lr", -1},
                                          {"betas", 0},
                                          {"betas", 1},
                                          {"eps", -1},
                                          {"weight_decay", -1},
                                          {"variant", -1, kVariants},
                                          {"grad_averaging", -1},
                                          {"bias_correction", -1},
                                          {"init_zero", -1},
                                          {"norm_type", -1},
                                          {"reg_inside_moment", -1},
                                          {"decoupled_decay", -1},
                                          {"weight_decouple", -1},
                                          {"fixed_decay", -1},
                                          {"eps_root", -1}};
  static unsigned needs(const Hyper& hyper) { return hyper.norm_type == 0 ? kNeedsGradMax : kNeedsGradSq; }

  template <class T>
  using Scalars = MomentumScalars<T>;

  template <class T>
  FO_HOST_DEVICE static Scalars<T> prepare(const Hyper& hyper, TensorContext& tensor) {
    double& step = tensor.state[0];
    double& exp_avg_sq = tensor.state[1];
    step = step + 1;
    const double lr = hyper.lr * tensor.lr_scale;
    const double weight_decay = hyper.weight_decay * tensor.weight_decay_scale;
    const bool apex = hyper.variant == kApex;
    const bool inf_norm = hyper.norm_type == 0;

    // The second moment of the norm.
    const double grad_norm_sq = inf_norm ? tensor.grad_max : tensor.grad_norm * tensor.grad_norm;
    const bool starts = exp_avg_sq == 0 && grad_norm_sq != 0;  // the first gradient that is not all zeros
    const bool replace = hyper.variant == kOpenSeq2Seq || (starts && hyper.init_zero == 0);
    exp_avg_sq = replace ? grad_norm_sq : hyper.beta2 * exp_avg_sq + (1 - hyper.beta2) * grad_norm_sq;
    double second_moment = exp_avg_sq;
    if constexpr (kAmsgrad) {
      double& max_exp_avg_sq = tensor.state[2];
      max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
      second_moment = max_exp_avg_sq;
    }

    // What the gradient is divided by.
    const bool corrected = apex && hyper.bias_correction != 0;
    const double bias_correction1 = corrected ? one_minus_power(hyper.beta1, step) : 1;
    const double bias_correction2 = corrected ? sqrt(one_minus_power(hyper.beta2, step)) : 1;
    const double eps_inside = hyper.variant == kOpenSeq2Seq ? hyper.eps : hyper.eps_root;
    const double eps_outside = hyper.variant == kOpenSeq2Seq ? 0 : hyper.eps;
    const double norm = inf_norm ? second_moment : sqrt(second_moment + eps_inside);
    const double denom = norm / bias_correction2 + eps_outside;

    // Where weight decay stands: on the parameter, or in the moment.
    double decay = 1, coupled = weight_decay;
    if (hyper.decoupled_decay != 0 || hyper.weight_decouple != 0) {
      decay = hyper.fixed_decay != 0 ? 1 - weight_decay : 1 - lr * weight_decay;
      coupled = 0;
    }
    const bool divided_before = !apex || hyper.reg_inside_moment != 0;
    if (!divided_before) {
      decay = 1 - lr * weight_decay;
      coupled = 0;
    }

    const bool first = step == 1 || starts;
    const bool averaged =
        hyper.grad_averaging != 0 && !(first && (hyper.variant == kKozistr || hyper.variant == kTfa));
    const double grad_weight = averaged ? 1 - hyper.beta1 : 1;
    const bool lr_in_buffer = hyper.variant == kTfa;
    double step_size = lr_in_buffer ? 1 : lr / bias_correction1;
    if (hyper.variant == kKozistr && hyper.bias_correction != 0) {
      step_size = step_size * sqrt(one_minus_power(hyper.beta2, step));
    }
    if (divided_before) {
      tensor.grad_scale = tensor.grad_scale / denom;
      tensor.coupled_weight_decay = tensor.coupled_weight_decay / denom + coupled;
    } else {
      step_size = step_size / denom;
    }

    Scalars<T> s;
    s.buffer_decay = static_cast<T>(hyper.beta1);
    s.grad_weight = static_cast<T>(lr_in_buffer ? lr * grad_weight : grad_weight);
    s.decay = static_cast<T>(decay);
    s.step_size = static_cast<T>(step_size);
    s.grad_step = 0;
    return s;
  }

  template <class T>
  FO_HOST_DEVICE static void update(T& param, T grad, T* state, const Scalars<T>& s) {
    update_momentum(param, grad, state[0], s);
  }
};

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
