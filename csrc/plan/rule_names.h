// What Python calls the states and hyperparameters of each rule.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>
#include <vector>

#include "rules/rule.h"

namespace fused_optim {

// Interned names that never die: group and state keys are compared by identity first.
struct RuleNames {
  std::string name;
  std::vector<PyObject*> state_names;
  std::vector<PyObject*> scale_names;  // of the scales of those states, where they are codes
  std::vector<bool> per_tensor;
  struct Hyper {
    PyObject* key;
    HyperField field;
  };
  std::vector<Hyper> hyper;
};

// Of all rules, in the order of their list.
const std::vector<RuleNames>& rule_names();
inline const RuleNames& names_of_rule(int rule) { return rule_names()[static_cast<size_t>(rule)]; }

}  // namespace fused_optim
