// Lion: the sign of an interpolated momentum.
#pragma once

#include "rule.h"

namespace fused_optim {
inline namespace FO_INSTRUCTION_SET {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr int kStateCount = 1;
  static constexpr bool kHasDirection = false;
  static constexpr bool kKeepsDirection = false;
  static constexpr StateField kStates[] = {{"exp_avg", false}};

  struct Hyper {
    double lr, beta1, beta2, weight_decay;
  };
  static constexpr HyperField kHyper[] = {{"lr", -1}, {"betas", 0}, {"betas", 1}, {"weight_decay", -1}};
  static unsigned needs(const Hyper&) { return 0; }

  template <class T>
  struct Scalars {
    T beta1, one_minus_beta1, beta2, one_minus_beta2, decay, step_size;
  };

  template <class T>
  FO_HOST_DEVICE static Scalars<T> prepare(const Hyper& hyper, TensorContext& tensor) {
    const double lr = hyper.lr * tensor.lr_scale;
    const double weight_decay = hyper.weight_decay * tensor.weight_decay_scale;
    Scalars<T> s;
    s.beta1 = static_cast<T>(hyper.beta1);
    s.one_minus_beta1 = static_cast<T>(1 - hyper.beta1);
    s.beta2 = static_cast<T>(hyper.beta2);
    s.one_minus_beta2 = static_cast<T>(1 - hyper.beta2);
    s.decay = static_cast<T>(1 - lr * weight_decay);
    s.step_size = static_cast<T>(lr);
    return s;
  }

  template <class T>
  FO_HOST_DEVICE static void update(T& param, T grad, T* state, const Scalars<T>& s) {
    T& exp_avg = state[0];
    const T direction = sign(s.beta1 * exp_avg + s.one_minus_beta1 * grad);
    exp_avg = s.beta2 * exp_avg + s.one_minus_beta2 * grad;
    param = s.decay * param - s.step_size * direction;
  }
};

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
