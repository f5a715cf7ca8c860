// Muon: momentum whose matrices are made orthogonal between the two passes; torch.optim's mathematics.
#pragma once

#include "rule.h"

namespace fused_optim {
inline namespace FO_INSTRUCTION_SET {

struct Muon {
  static constexpr const char* kName = "muon";
  static constexpr int kStateCount = 2;
  static constexpr bool kHasDirection = true;
  static constexpr bool kKeepsDirection = true;
  static constexpr StateField kStates[] = {{"momentum_buffer", false}, {"direction", false}};

  struct Hyper {
    double lr, momentum, weight_decay, nesterov;
  };
  static constexpr HyperField kHyper[] = {
      {"lr", -1}, {"momentum", -1}, {"weight_decay", -1}, {"nesterov", -1}};
  static unsigned needs(const Hyper&) { return 0; }

  template <class T>
  struct Scalars {
    T momentum, one_minus_momentum, nesterov, weight_decay, step_size;
  };

  template <class T>
  FO_HOST_DEVICE static Scalars<T> prepare(const Hyper& hyper, TensorContext& tensor) {
    Scalars<T> s;
    s.momentum = static_cast<T>(hyper.momentum);
    s.one_minus_momentum = static_cast<T>(1 - hyper.momentum);
    s.nesterov = static_cast<T>(hyper.nesterov != 0 ? 1 : 0);
    s.weight_decay = static_cast<T>(hyper.weight_decay * tensor.weight_decay_scale);
    s.step_size = static_cast<T>(hyper.lr * tensor.lr_scale);
    return s;
  }

  template <class T>
  FO_HOST_DEVICE static void accumulate(T grad, T* state, const Scalars<T>& s) {
    T& momentum_buffer = state[0];
    momentum_buffer = s.momentum * momentum_buffer + s.one_minus_momentum * grad;
    state[1] = s.nesterov != 0 ? s.momentum * momentum_buffer + s.one_minus_momentum * grad : momentum_buffer;
  }

  template <class T>
  FO_HOST_DEVICE static T direction(T param, const T* kept, const Scalars<T>& s) {
    return s.weight_decay != 0 ? *kept + s.weight_decay * param : *kept;
  }
};

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
