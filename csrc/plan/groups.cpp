#include "plan/groups.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "cpu/phases.h"
#include "plan/attributes.h"

namespace fused_optim {
namespace {

// Objects of these types cannot change while they are the same object.
bool is_constant(PyObject* value) {
  if (PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyUnicode_CheckExact(value) ||
      PyBool_Check(value) || value == Py_None)
    return true;
  if (!PyTuple_CheckExact(value)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
    if (!is_constant(PyTuple_GET_ITEM(value, i))) return false;
  }
  return true;
}

// An element of a pair such as betas. PySequence_GetItem would not take a Tensor.
PyObject* item_of(PyObject* value, int index) {
  const Owned key(PyLong_FromLong(index));
  return key ? PyObject_GetItem(value, key.get()) : nullptr;
}

PyObject* maximize_name() {
  static PyObject* const name = intern("maximize");
  return name;
}

PyObject* params_name() {
  static PyObject* const name = intern("params");
  return name;
}

}  // namespace

bool GroupReader::open(PyObject* rules, PyObject* defaults, PyObject* structural, PyObject* trust_ratio,
                       PyObject* limits, PyObject* check) {
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(rules); ++g) {
    const char* name = PyUnicode_AsUTF8(PyList_GET_ITEM(rules, g));
    if (name == nullptr) return false;
    const auto& known = rule_names();
    const auto found =
        std::find_if(known.begin(), known.end(), [&](const RuleNames& r) { return r.name == name; });
    if (found == known.end()) {
      PyErr_Format(PyExc_ValueError, "no rule is named %s", name);
      return false;
    }
    groups_.emplace_back();
    groups_.back().rule = static_cast<int>(found - known.begin());
    if (!read_limits(limits, groups_.back())) return false;
  }
  hypers_.resize(groups_.size());
  tensors_.resize(groups_.size());
  Py_INCREF(defaults);
  defaults_ = defaults;
  Py_INCREF(trust_ratio);
  trust_ratio_ = trust_ratio;
  Py_INCREF(check);
  check_ = check;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(structural); ++i) {
    PyObject* key = PyTuple_GET_ITEM(structural, i);
    Py_INCREF(key);
    structural_keys_.push_back(key);
  }
  return true;
}

void GroupReader::add_row(size_t index, const dlpack::Device* device) {
  Group& group = groups_[index];
  ++group.row_count;
  const auto is_known = [&](const dlpack::Device& known) { return is_same(known, *device); };
  if (device != nullptr && std::none_of(group.devices.begin(), group.devices.end(), is_known)) {
    group.devices.push_back(*device);
  }
}

bool GroupReader::number(PyObject* value, double* out) {
  if (PyFloat_CheckExact(value)) {
    *out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  TensorView view;
  if (!PyLong_Check(value) && !PyFloat_Check(value) && reader_.read(value, view)) {
    int64_t numel = 1;
    for (int i = 0; i < view.ndim; ++i) numel *= view.shape[i];
    if (numel == 1 && view.device.device_type == dlpack::kCPU && view.address != 0) {
      if (view.dtype == DType::float32) {
        *out = *reinterpret_cast<const float*>(view.address);
        return true;
      }
      if (view.dtype == DType::float64) {
        *out = *reinterpret_cast<const double*>(view.address);
        return true;
      }
    }
  }
  PyObject* as_float = PyUnicode_Check(value) ? nullptr : PyNumber_Float(value);
  if (as_float == nullptr) return false;
  *out = PyFloat_AS_DOUBLE(as_float);
  Py_DECREF(as_float);
  return true;
}

bool GroupReader::read_trust_ratio(PyObject* group, TrustRatio* out) {
  static PyObject* const coefficient = intern("coefficient");
  static PyObject* const eps = intern("eps");
  static PyObject* const min_update = intern("min_update");
  static PyObject* const clip = intern("clip");
  static PyObject* const zero_norm = intern("zero_norm");
  static PyObject* const weight_decay = intern("weight_decay");
  static PyObject* const always = intern("always");
  const Owned found(PyObject_CallFunctionObjArgs(trust_ratio_, group, nullptr));
  if (!found) return false;
  if (found.get() == Py_None) return true;
  out->present = 1;
  Attributes attributes(found.get());
  attributes.read(coefficient, out->coefficient);
  attributes.read(eps, out->eps);
  attributes.read(min_update, out->min_update);
  attributes.read(clip, out->clip);
  attributes.read(zero_norm, out->zero_norm);
  attributes.read(weight_decay, out->weight_decay);
  attributes.read(always, out->always);
  return attributes.good();
}

// The index of a string among the choices of its field.
bool GroupReader::choice(PyObject* value, const HyperField& field, double* out) {
  const char* text = PyUnicode_Check(value) ? PyUnicode_AsUTF8(value) : nullptr;
  for (int i = 0; text != nullptr && field.choices[i] != nullptr; ++i) {
    if (std::strcmp(text, field.choices[i]) != 0) continue;
    *out = i;
    return true;
  }
  return false;
}

// Whether the rows' kernels can read this hyperparameter where it lies: one number on the device that all of
// the group's rows are on.
bool GroupReader::is_on_device_of_rows(const Group& group, const TensorView& view) const {
  if (view.device.device_type == dlpack::kCPU || view.address == 0 || !is_number(view.dtype)) return false;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] != 1) return false;
  }
  return std::all_of(group.devices.begin(), group.devices.end(),
                     [&](const dlpack::Device& device) { return is_same(device, view.device); });
}

bool GroupReader::read_limits(PyObject* limits, Group& group) {
  for (const RuleNames::Hyper& hyper : rule_names()[static_cast<size_t>(group.rule)].hyper) {
    Limits of_key{0, 0, true};
    PyObject* found = PyDict_GetItemWithError(limits, hyper.key);
    if (found == nullptr && PyErr_Occurred()) return false;
    of_key.any = found == nullptr || hyper.field.choices != nullptr;
    if (!of_key.any && !PyArg_ParseTuple(found, "dd", &of_key.least, &of_key.most)) return false;
    group.limits.push_back(of_key);
  }
  return true;
}

// Always false, with an error set: what the check says of the group, as with every backend; otherwise what
// this plan has said of a value that only it cannot read.
bool GroupReader::refuse(PyObject* group, size_t index) {
  if (check_ == Py_None) return false;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  const Owned passed(PyObject_CallFunction(check_, "nO", static_cast<Py_ssize_t>(index), group));
  if (passed) {
    PyErr_Restore(type, value, trace);
  } else {
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
  }
  return false;
}

bool GroupReader::parse(PyObject* group, size_t index, bool* stale) {
  Group& known = groups_[index];
  const RuleNames& rule = rule_names()[static_cast<size_t>(known.rule)];
  bool constant = true;
  for (size_t i = 0; i < structural_keys_.size(); ++i) {
    PyObject* value = PyDict_GetItemWithError(group, structural_keys_[i]);
    if (PyErr_Occurred()) return false;
    constant = constant && (value == nullptr || is_constant(value));
    const int truth = value == nullptr ? 0 : PyObject_IsTrue(value);
    if (truth < 0) return false;
    if (known.structural.size() <= i) {
      known.structural.push_back(truth);
    } else if (truth != known.structural[i]) {
      *stale = true;
      return true;
    }
  }
  double hyper[kMaxHyper], maximize = 0;
  TrustRatio trust{};
  if (trust_ratio_ != Py_None && !read_trust_ratio(group, &trust)) return refuse(group, index);
  HyperTensors tensors{};
  PyObject* maximizes = PyDict_GetItemWithError(group, maximize_name());
  if (maximizes == nullptr && PyErr_Occurred()) return false;
  if (maximizes != nullptr) {
    constant = constant && is_constant(maximizes);
    const int truth = PyObject_IsTrue(maximizes);
    if (truth < 0) return false;
    maximize = truth;
  }
  for (size_t i = 0; i < rule.hyper.size(); ++i) {
    PyObject* key = rule.hyper[i].key;
    PyObject* value = PyDict_GetItemWithError(group, key);
    if (value == nullptr && !PyErr_Occurred()) value = PyDict_GetItemWithError(defaults_, key);
    if (PyErr_Occurred()) return false;
    const HyperField& field = rule.hyper[i].field;
    if (value == nullptr && field.optional) {
      hyper[i] = 0;
      continue;
    }
    if (value == nullptr) {
      PyErr_Format(PyExc_KeyError, "param_groups[%zu] has no %R and the optimizer no default for it", index,
                   key);
      return false;
    }
    constant = constant && is_constant(value);
    PyObject* item = value;
    Py_INCREF(item);
    if (field.index >= 0) {
      Py_DECREF(item);
      const auto of_key = [&](const auto& other) { return other.key == key; };
      const auto length = std::count_if(rule.hyper.begin(), rule.hyper.end(), of_key);
      item = PySequence_Size(value) == length ? item_of(value, field.index) : nullptr;
    }
    TensorView view;
    bool good = item != nullptr;
    if (field.choices != nullptr) {
      good = good && choice(item, field, &hyper[i]);
    } else if (good && device_tensors_ && !PyFloat_CheckExact(item) && !PyLong_Check(item) &&
               reader_.read(item, view) && is_on_device_of_rows(known, view)) {
      hyper[i] = 0;
      tensors.address[i] = view.address;
      tensors.dtype[i] = view.dtype;
    } else {
      good = good && number(item, &hyper[i]);
      const Limits& limits = known.limits[i];
      good =
          good && (limits.any || (hyper[i] >= limits.least && hyper[i] <= limits.most));  // a NaN is neither
    }
    Py_XDECREF(item);
    if (!good && field.choices != nullptr) {
      std::string words;
      for (const char* const* word = field.choices; *word != nullptr; ++word) {
        words += words.empty() ? "'" : ", '";
        words += *word;
        words += "'";
      }
      PyErr_Format(PyExc_ValueError, "param_groups[%zu][%R] must be one of %s, got %R", index, key,
                   words.c_str(), value);
    } else if (!good) {
      PyErr_Format(PyExc_TypeError, "param_groups[%zu][%R] must hold numbers or one-element Tensors, got %s",
                   index, key, Py_TYPE(value)->tp_name);
    }
    if (!good) return refuse(group, index);
  }
  GroupHyper& parsed = hypers_[index];
  parsed.maximize = maximize;
  parsed.trust = trust;
  std::memcpy(parsed.rule, hyper, rule.hyper.size() * sizeof(double));
  const unsigned rule_needs = needs_of_rule(known.rule, parsed);
  parsed.needs = rule_needs | needs_of(trust, rule_needs);
  tensors_[index] = tensors;
  std::vector<Entry> entries;
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(group, &position, &key, &value);) {
    // What a trust ratio reads of the group, only it knows.
    if (trust.present != 0 && !PyList_Check(value)) constant = constant && is_constant(value);
    Py_INCREF(key);
    PyObject* const kept = is_constant(value) ? value : nullptr;  // what can change could hold parameters
    Py_XINCREF(kept);
    entries.push_back({key, kept});
  }
  entries.swap(known.entries);
  known.constant = constant;
  for (const Entry& entry : entries) {
    Py_DECREF(entry.key);
    Py_XDECREF(entry.value);
  }
  return true;
}

GroupReader::Read GroupReader::refresh(PyObject* group, size_t index, PyObject** params) {
  if (!PyDict_Check(group)) return Read::stale;
  Group& known = groups_[index];
  bool unchanged = known.constant;
  *params = nullptr;
  if (unchanged) {
    size_t i = 0;
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(group, &position, &key, &value); ++i) {
      if (i == known.entries.size() || known.entries[i].key != key) {
        unchanged = false;
        break;
      }
      if (key == params_name()) {
        *params = value;
      } else if (known.entries[i].value != value &&
                 (known.entries[i].value != nullptr || is_constant(value))) {
        unchanged = false;
        break;
      }
    }
    unchanged = unchanged && i == known.entries.size();
  }
  if (!unchanged) {
    bool stale = false;
    if (!parse(group, index, &stale)) return Read::error;
    if (stale) return Read::stale;
  }
  if (*params == nullptr) *params = PyDict_GetItemWithError(group, params_name());
  if (*params == nullptr || !(PyList_Check(*params) || PyTuple_Check(*params))) return Read::stale;
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(*params));
  return count == known.row_count ? Read::ok : Read::stale;
}

int GroupReader::traverse(visitproc visit, void* arg) const {
  for (const Group& group : groups_) {
    for (const Entry& entry : group.entries) {
      Py_VISIT(entry.key);
      Py_VISIT(entry.value);
    }
  }
  for (PyObject* key : structural_keys_) Py_VISIT(key);
  Py_VISIT(defaults_);
  Py_VISIT(trust_ratio_);
  Py_VISIT(check_);
  return 0;
}

void GroupReader::clear() {
  // Emptied before anything is let go of: a destructor may run Python code that meets this plan.
  std::vector<Group> groups;
  std::vector<PyObject*> keys;
  groups.swap(groups_);
  keys.swap(structural_keys_);
  for (Group& group : groups) {
    for (Entry& entry : group.entries) {
      Py_DECREF(entry.key);
      Py_XDECREF(entry.value);
    }
  }
  for (PyObject* key : keys) Py_DECREF(key);
  Py_CLEAR(defaults_);
  Py_CLEAR(trust_ratio_);
  Py_CLEAR(check_);
}

}  // namespace fused_optim
