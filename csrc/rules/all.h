// The list of rules: the only registry in C++. A row's `rule` is an index into it.
#pragma once

#include "adamw.h"
#include "lamb.h"
#include "lion.h"
#include "muon.h"
#include "novograd.h"
#include "sgd.h"

namespace fused_optim {
inline namespace FO_INSTRUCTION_SET {

template <class... R>
struct RuleList {
  static constexpr int kCount = sizeof...(R);
};

using Rules =
    RuleList<Adam<false>, Adam<true>, Sgd, Momentum, NovoGrad<false>, NovoGrad<true>, Lamb, Lion, Muon>;

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
