// SGD, without and with momentum: torch.optim's mathematics. LARS is the latter with a trust ratio.
#pragma once

#include "momentum.h"

namespace fused_optim {
inline namespace FO_INSTRUCTION_SET {

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr int kStateCount = 0;
  static constexpr bool kHasDirection = false;
  static constexpr bool kKeepsDirection = false;
  static constexpr StateField kStates[] = {{"", false}};

  struct Hyper {
    double lr, weight_decay;
  };
  static constexpr HyperField kHyper[] = {{"lr", -1}, {"weight_decay", -1}};
  static unsigned needs(const Hyper&) { return 0; }

  template <class T>
  struct Scalars {
    T step_size;
  };

  template <class T>
  FO_HOST_DEVICE static Scalars<T> prepare(const Hyper& hyper, TensorContext& tensor) {
    tensor.coupled_weight_decay += hyper.weight_decay * tensor.weight_decay_scale;
    return {static_cast<T>(hyper.lr * tensor.lr_scale)};
  }

  template <class T>
  FO_HOST_DEVICE static void update(T& param, T grad, T*, const Scalars<T>& s) {
    param = param - s.step_size * grad;
  }
};

struct Momentum {
  static constexpr const char* kName = "momentum";
  static constexpr int kStateCount = 2;
  static constexpr bool kHasDirection = false;
  static constexpr bool kKeepsDirection = false;
  static constexpr StateField kStates[] = {{"step", true}, {"momentum_buffer", false}};

  struct Hyper {
    double lr, momentum, dampening, weight_decay, nesterov, variant;
  };
  static constexpr const char* kVariants[] = {"timm", "optax", "kozistr", nullptr};
  static constexpr HyperField kHyper[] = {{"lr", -1},        {"momentum", -1},
                                          {"dampening", -1}, {"weight_decay", -1},
                                          {"nesterov", -1},  {"variant", -1, kVariants, true}};
  static unsigned needs(const Hyper&) { return 0; }

  template <class T>
  using Scalars = MomentumScalars<T>;

  template <class T>
  FO_HOST_DEVICE static Scalars<T> prepare(const Hyper& hyper, TensorContext& tensor) {
    double& step = tensor.state[0];
    step = step + 1;
    const bool first = step == 1;
    const bool lr_in_buffer = hyper.variant == 1;
    const double lr = hyper.lr * tensor.lr_scale;
    tensor.coupled_weight_decay += hyper.weight_decay * tensor.weight_decay_scale;
    const double grad_weight = first ? 1 : 1 - hyper.dampening;
    const double step_size = lr_in_buffer ? 1 : lr;
    const bool nesterov = hyper.nesterov != 0;
    Scalars<T> s;
    s.buffer_decay = static_cast<T>(first ? 0 : hyper.momentum);
    s.grad_weight = static_cast<T>(lr_in_buffer ? lr * grad_weight : grad_weight);
    s.decay = 1;
    s.step_size = static_cast<T>(nesterov ? step_size * hyper.momentum : step_size);
    s.grad_step = static_cast<T>(nesterov ? lr : 0);
    return s;
  }

  template <class T>
  FO_HOST_DEVICE static void update(T& param, T grad, T* state, const Scalars<T>& s) {
    update_momentum(param, grad, state[0], s);
  }
};

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
