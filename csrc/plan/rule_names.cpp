#include "plan/rule_names.h"

#include "plan/attributes.h"
#include "prepare.h"
#include "rules/all.h"

namespace fused_optim {
namespace {

template <class R>
RuleNames names_of() {
  RuleNames names{R::kName, {}, {}, {}, {}};
  for (int i = 0; i < parameter_states<R>(); ++i) {
    names.state_names.push_back(intern(R::kStates[i].name));
    names.scale_names.push_back(intern((std::string(R::kStates[i].name) + "_scale").c_str()));
    names.per_tensor.push_back(R::kStates[i].per_tensor);
  }
  for (const HyperField& field : R::kHyper) names.hyper.push_back({intern(field.key), field});
  return names;
}

template <class... R>
std::vector<RuleNames> all_names(RuleList<R...>) {
  return {names_of<R>()...};
}

}  // namespace

const std::vector<RuleNames>& rule_names() {
  static const auto* const names = new std::vector<RuleNames>(all_names(Rules{}));
  return *names;
}

}  // namespace fused_optim
