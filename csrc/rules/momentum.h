// The element update that SGD with momentum, LARS and every variant of NovoGrad share: they differ in what
// prepare makes of their hyperparameters.
#pragma once

#include "rule.h"

namespace fused_optim {
inline namespace FO_INSTRUCTION_SET {

template <class T>
struct MomentumScalars {
  T buffer_decay, grad_weight, decay, step_size;
  T grad_step;  // Nesterov's: the part of the step that the gradient takes itself
};

template <class T>
FO_HOST_DEVICE inline void update_momentum(T& param, T grad, T& buffer, const MomentumScalars<T>& s) {
  buffer = s.buffer_decay * buffer + s.grad_weight * grad;
  param = s.decay * param - s.step_size * buffer;
  param = s.grad_step != 0 ? param - s.grad_step * grad : param;
}

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
