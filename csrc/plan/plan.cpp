#include "plan/plan.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "plan/attributes.h"

namespace fused_optim {
namespace {

template <class R>
RuleNames names_of() {
  RuleNames names{R::kName, {}, {}, {}};
  for (int i = 0; i < R::kStateCount; ++i) {
    names.state_names.push_back(intern(R::kStates[i].name));
    names.per_tensor.push_back(R::kStates[i].per_tensor);
  }
  for (const HyperField& field : R::kHyper) names.hyper.push_back({intern(field.key), field});
  return names;
}

template <class... R>
std::vector<RuleNames> all_names(RuleList<R...>) {
  return {names_of<R>()...};
}

bool is_number(DType dtype) { return dtype != DType::none && dtype != DType::remainder; }

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

PyObject* grad_name() {
  static PyObject* const name = intern("grad");
  return name;
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

const std::vector<RuleNames>& rule_names() {
  static const auto* const names = new std::vector<RuleNames>(all_names(Rules{}));
  return *names;
}

bool Plan::open(PyObject* exchange_api, PyObject* kind_of, PyObject* same_placement, PyObject* describe,
                PyObject* current_stream, PyObject* negative_bit, const CpuKernels* kernels) {
  kernels_ = kernels;
  return reader_.open(exchange_api, kind_of, same_placement, describe, current_stream, negative_bit);
}

bool Plan::build(PyObject* rules, PyObject* rows, PyObject* triton_rows, PyObject* defaults,
                 PyObject* structural, PyObject* trust_ratio, PyObject* limits, PyObject* check) {
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
  hyper_tensors_.resize(groups_.size());
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
  for (Py_ssize_t r = 0; r < PyList_GET_SIZE(rows); ++r) {
    if (!add_row(PyList_GET_ITEM(rows, r))) return false;
  }
  size_t next = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    groups_[g].first_row = next;
    while (next < rows_.size() && rows_[next].group == static_cast<int32_t>(g)) ++next;
    groups_[g].last_row = next;
  }
  if (!read_triton_rows(triton_rows)) return false;
  make_phases();
  return true;
}

bool Plan::read_triton_rows(PyObject* devices) {
  for (Py_ssize_t d = 0; d < PyList_GET_SIZE(devices); ++d) {
    PyObject* indices = PyList_GET_ITEM(devices, d);
    triton_rows_.emplace_back();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(indices); ++i) {
      const size_t row = PyLong_AsSize_t(PyList_GET_ITEM(indices, i));
      if (PyErr_Occurred()) return false;
      triton_rows_.back().push_back(row);
      hosts_.at(row).is_triton = true;
    }
  }
  return true;
}

bool Plan::add_row(PyObject* object) {
  static PyObject* const group = intern("group");
  static PyObject* const param_name = intern("param");
  static PyObject* const lr_scale = intern("lr_scale");
  static PyObject* const weight_decay_scale = intern("weight_decay_scale");
  static PyObject* const is_native = intern("native");
  static PyObject* const clipped = intern("clipped");
  static PyObject* const has_trust_ratio = intern("has_trust_ratio");
  static PyObject* const master = intern("master");
  Row row{};
  HostRow host;
  bool native = false;
  Attributes attributes(object);
  attributes.read(group, row.group);
  attributes.read(lr_scale, row.lr_scale);
  attributes.read(weight_decay_scale, row.weight_decay_scale);
  attributes.read(is_native, native);
  attributes.read(clipped, row.clipped);
  attributes.read(has_trust_ratio, row.has_trust_ratio);
  attributes.read(master, [&](PyObject* key) {
    const char* text = key == Py_None ? nullptr : PyUnicode_AsUTF8(key);
    if (text != nullptr) host.master_key = intern(text);
  });
  const Owned owned_param(attributes.good() ? PyObject_GetAttr(object, param_name) : nullptr);
  PyObject* const param = owned_param.get();
  if (param == nullptr) return false;
  host.type = Py_TYPE(param);
  PyObject* descriptor = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(param)), grad_name());
  if (descriptor == nullptr) return false;
  if (Py_TYPE(descriptor) == &PyGetSetDescr_Type && Py_TYPE(param)->tp_getattro == PyObject_GenericGetAttr) {
    host.grad_getter = reinterpret_cast<PyGetSetDescrObject*>(descriptor);  // its type outlives the parameter
  }
  Py_DECREF(descriptor);
  TensorView view;
  row.rule = groups_[static_cast<size_t>(row.group)].rule;
  PyObject* spec = nullptr;
  host.sharded = reader_.kind_of(host.type) == TensorKind::sharded;
  const bool readable =
      native && (host.sharded ? reader_.read_local(param, view, &spec) : reader_.read(param, view));
  if (readable && is_number(view.dtype)) {
    host.native = true;
    if (host.sharded) {
      host.specs = specs_.size();
      specs_.resize(specs_.size() + kColumns, nullptr);
      Py_INCREF(spec);
      specs_[host.specs + kParam] = spec;
    }
    host.ndim = view.ndim;
    host.device = view.device;
    host.layout = layouts_.size();
    layouts_.insert(layouts_.end(), view.shape, view.shape + view.ndim);
    layouts_.insert(layouts_.end(), view.strides, view.strides + view.ndim);
    row.dtype[kParam] = view.dtype;
    row.numel = 1;
    for (int i = 0; i < view.ndim; ++i) row.numel *= view.shape[i];
  }
  host.param = param;
  host.param_ref = PyWeakref_NewRef(param, nullptr);
  if (host.param_ref == nullptr) return false;
  hosts_.push_back(host);
  rows_.push_back(row);
  return true;
}

// Whether the row's parameter lives: another one may have its address.
bool Plan::is_alive(const HostRow& host) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* param = nullptr;
  const bool alive = PyWeakref_GetRef(host.param_ref, &param) == 1;
  Py_XDECREF(param);
  return alive;
#else
  return PyWeakref_GET_OBJECT(host.param_ref) == host.param;
#endif
}

// torch's getter called directly: 15 ns less than through the attribute lookup.
PyObject* Plan::grad_of(const HostRow& host) const {
  if (host.grad_getter == nullptr) return PyObject_GetAttr(host.param, grad_name());
  const PyGetSetDef* definition = host.grad_getter->d_getset;
  return definition->get(host.param, definition->closure);
}

bool Plan::number(PyObject* value, double* out) {
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

bool Plan::read_trust_ratio(PyObject* group, TrustRatio* out) {
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
bool Plan::choice(PyObject* value, const HyperField& field, double* out) {
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
bool Plan::is_on_device_of_rows(const Group& group, const TensorView& view) const {
  if (view.device.device_type == dlpack::kCPU || view.address == 0 || !is_number(view.dtype)) return false;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] != 1) return false;
  }
  for (size_t r = group.first_row; r < group.last_row; ++r) {
    const HostRow& host = hosts_[r];
    if (host.native && (host.device.device_type != view.device.device_type ||
                        host.device.device_id != view.device.device_id)) {
      return false;
    }
  }
  return true;
}

bool Plan::read_limits(PyObject* limits, Group& group) {
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
bool Plan::refuse(PyObject* group, size_t index) {
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

bool Plan::parse_group(PyObject* group, size_t index, bool* stale) {
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
    } else if (good && !(devices_.empty() && triton_rows_.empty()) && !PyFloat_CheckExact(item) &&
               !PyLong_Check(item) && reader_.read(item, view) && is_on_device_of_rows(known, view)) {
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
  hyper_tensors_[index] = tensors;
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

Plan::Read Plan::refresh_group(PyObject* group, size_t index, PyObject** params) {
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
    if (!parse_group(group, index, &stale)) return Read::error;
    if (stale) return Read::stale;
  }
  if (*params == nullptr) *params = PyDict_GetItemWithError(group, params_name());
  if (*params == nullptr || !(PyList_Check(*params) || PyTuple_Check(*params))) return Read::stale;
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(*params));
  return count == known.last_row - known.first_row ? Read::ok : Read::stale;
}

PyObject* Plan::refresh(PyObject* param_groups, PyObject* state) {
  release();
  collected_ = false;
  if (!PyList_Check(param_groups) || static_cast<size_t>(PyList_GET_SIZE(param_groups)) != groups_.size() ||
      !PyDict_Check(state)) {
    Py_RETURN_NONE;
  }
  PyObject* attention = nullptr;  // a list, once there is a row for it
  states_located_ = false;
  active_elements_ = active_rows_ = 0;
  const auto leave = [&](PyObject* result) {
    Py_XDECREF(attention);
    release();
    return result;
  };
  const auto attend = [&](size_t r, const char* reason) {
    if (attention == nullptr && (attention = PyList_New(0)) == nullptr) return false;
    PyObject* entry = Py_BuildValue("(ns)", static_cast<Py_ssize_t>(r), reason);
    const bool good = entry != nullptr && PyList_Append(attention, entry) == 0;
    Py_XDECREF(entry);
    return good;
  };
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* params;
    const Read read = refresh_group(PyList_GET_ITEM(param_groups, static_cast<Py_ssize_t>(g)), g, &params);
    if (read == Read::error) return leave(nullptr);
    if (read == Read::stale) {
      leave(nullptr);
      Py_RETURN_NONE;
    }
    PyObject** items = PySequence_Fast_ITEMS(params);
    for (size_t r = groups_[g].first_row; r < groups_[g].last_row; ++r) {
      HostRow& host = hosts_[r];
      if (*items++ != host.param || !is_alive(host) || Py_TYPE(host.param) != host.type) {
        leave(nullptr);
        Py_RETURN_NONE;
      }
      const bool was_active = rows_[r].active;
      rows_[r].active = false;
      host.grad = grad_of(host);
      if (host.grad == nullptr) return leave(nullptr);
      if (host.grad != Py_None) {
        Py_INCREF(host.param);
        host.held = true;
        const char* reason = refresh_row(host, rows_[r], state);
        if (reason == nullptr) {
          rows_[r].active = true;
          active_elements_ += rows_[r].numel;
          ++active_rows_;
        } else if (*reason == '\0') {
          leave(nullptr);
          Py_RETURN_NONE;
        } else if (!attend(r, reason)) {
          return leave(nullptr);
        }
      }
      if (rows_[r].active != was_active) active_changed_ = true;
    }
  }
  if (written_moved_ || active_changed_) find_overlaps();
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (!rows_[r].active || !hosts_[r].overlapping) continue;
    rows_[r].active = false;
    active_changed_ = true;
    active_elements_ -= rows_[r].numel;
    --active_rows_;
    if (!attend(r, "overlap")) return leave(nullptr);
  }
  for (CudaPhases* phases : devices_) {
    void* stream;
    if (!reader_.read_stream(phases->device(), &stream)) return leave(nullptr);
    phases->work_on(stream);
  }
  return attention != nullptr ? attention : PyTuple_New(0);
}

// Whether a tensor's elements lie in the order of the parameter's. The stride of a dimension of size 1 says
// nothing, and none does where there are no elements.
bool Plan::same_layout(const HostRow& host, const TensorView& view) const {
  if (view.ndim != host.ndim || view.device.device_type != host.device.device_type ||
      view.device.device_id != host.device.device_id) {
    return false;
  }
  const int64_t* shape = layouts_.data() + host.layout;
  const int64_t* strides = shape + host.ndim;
  bool same = true, empty = false;
  for (int i = 0; i < host.ndim; ++i) {
    if (view.shape[i] != shape[i]) return false;
    same = same && (view.strides[i] == strides[i] || shape[i] == 1);
    empty = empty || shape[i] == 0;
  }
  return same || empty;
}

// The memory of one of a row's tensors, which must be of the parameter's kind and, if that is sharded, lie as
// it does. A spec that was accepted once is known by its identity.
bool Plan::read_column(const HostRow& host, int column, PyObject* object, TensorView& view) {
  if (!host.sharded) return reader_.read(object, view);
  PyObject* spec;
  if (!reader_.read_local(object, view, &spec)) return false;
  PyObject*& accepted = specs_[host.specs + static_cast<size_t>(column)];
  if (spec == accepted) return true;
  PyObject* const wanted = specs_[host.specs + kParam];
  const int same = column == kParam ? 0 : spec == wanted ? 1 : reader_.same_placement(spec, wanted);
  if (same < 0) PyErr_Clear();
  if (same <= 0) return false;
  Py_INCREF(spec);
  Py_XSETREF(accepted, spec);
  return true;
}

// Null: the row is ready. "": the parameter is no longer what the plan was built for. Otherwise what is
// wrong.
const char* Plan::refresh_row(HostRow& host, Row& row, PyObject* state) {
  if (!host.native) return "param";
  TensorView view;
  if (!read_column(host, kParam, host.param, view) || !same_layout(host, view) ||
      view.dtype != row.dtype[kParam])
    return "";
  if (view.address == 0 && row.numel != 0) return "param";
  if (row.address[kParam] != view.address) {
    row.address[kParam] = view.address;
    written_moved_ = true;
  }
  if (!read_column(host, kGrad, host.grad, view) || !same_layout(host, view)) return "grad";
  if (!is_number(view.dtype) || (view.address == 0 && row.numel != 0)) return "grad";
  if (view.dtype == DType::float64 && !computes_in_double(row.dtype[kParam])) return "grad";
  row.address[kGrad] = view.address;
  row.dtype[kGrad] = view.dtype;
  return read_states(host, row, state);
}

const char* Plan::read_states(HostRow& host, Row& row, PyObject* state) {
  if (rule_names()[static_cast<size_t>(row.rule)].state_names.empty() && host.master_key == nullptr)
    return nullptr;
  PyObject* states = find_state(host, state);
  if (states == nullptr || !PyDict_Check(states)) return "state";
  const RuleNames& rule = rule_names()[static_cast<size_t>(row.rule)];
  Py_ssize_t position = 0;
  bool in_order = true;
  const auto next = [&](PyObject* name) -> PyObject* {
    PyObject *key, *value;
    in_order = in_order && PyDict_Next(states, &position, &key, &value) && key == name;
    return in_order ? value : PyDict_GetItemWithError(states, name);
  };
  for (size_t i = 0; i < rule.state_names.size(); ++i) {
    PyObject* value = next(rule.state_names[i]);
    const char* reason = read_state(host, row, kFirstState + static_cast<int>(i), rule.per_tensor[i], value);
    if (reason != nullptr) return reason;
  }
  if (host.master_key == nullptr) return nullptr;
  return read_state(host, row, kMaster, false, next(host.master_key));
}

const char* Plan::read_state(const HostRow& host, Row& row, int column, bool per_tensor, PyObject* value) {
  TensorView view;
  if (value == nullptr ||
      !(per_tensor ? reader_.read(value, view) : read_column(host, column, value, view))) {
    PyErr_Clear();
    return "state";
  }
  if (per_tensor) {
    if (view.device.device_type != host.device.device_type ||
        view.device.device_id != host.device.device_id) {
      return "state";
    }
    for (int i = 0; i < view.ndim; ++i) {
      if (view.shape[i] != 1) return "state";
    }
    if (view.dtype != DType::float32 && view.dtype != DType::float64) return "state";
  } else {
    if (!same_layout(host, view)) return "state";
    const DType param = row.dtype[kParam];
    const bool narrow =
        size_of(param) == 2;  // 16-bit parameters may have wider states; others have their own dtype
    const bool number =
        is_number(view.dtype) && (narrow ? view.dtype != DType::float64 : view.dtype == param);
    const bool master =
        view.dtype == DType::float32 || (view.dtype == DType::remainder && param == DType::bfloat16);
    if (column == kMaster ? !master : !number) return "state";
  }
  if (view.address == 0 && (per_tensor || row.numel != 0)) return "state";
  if (row.address[column] != view.address) {
    row.address[column] = view.address;
    written_moved_ = true;
  }
  row.dtype[column] = view.dtype;
  return nullptr;
}

// The parameters' states stand in a dict whose keys hash slowly (Tensor.__hash__ is Python). The row
// remembers where PyDict_Next found its state; only if that is no longer so, all positions are looked up
// again.
PyObject* Plan::find_state(HostRow& host, PyObject* state) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    PyObject *key, *value;
    Py_ssize_t position = host.state_position;
    if (PyDict_Next(state, &position, &key, &value) && key == host.param) return value;
    if (states_located_) break;
    locate_states(state);
  }
  return nullptr;
}

void Plan::locate_states(PyObject* state) {
  std::unordered_map<PyObject*, Py_ssize_t> positions;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t before = 0; PyDict_Next(state, &position, &key, &value); before = position) {
    positions.emplace(key, before);
  }
  for (HostRow& host : hosts_) {
    const auto found = positions.find(host.param);
    if (found != positions.end()) host.state_position = found->second;
  }
  states_located_ = true;
}

// Two rows of one launch must not write the same memory.
void Plan::find_overlaps() {
  struct Range {
    uint64_t begin, end;
    size_t row;
  };
  std::vector<Range> ranges;
  for (size_t r = 0; r < rows_.size(); ++r) {
    hosts_[r].overlapping = false;
    if (!rows_[r].active) continue;
    for (int c = 0; c < kColumns; ++c) {
      if (c == kGrad || rows_[r].address[c] == 0) continue;
      const bool per_tensor =
          c >= kFirstState &&
          rule_names()[static_cast<size_t>(rows_[r].rule)].per_tensor[static_cast<size_t>(c - kFirstState)];
      const auto bytes = static_cast<uint64_t>(per_tensor ? 1 : rows_[r].numel) *
                         static_cast<uint64_t>(size_of(rows_[r].dtype[c]));
      if (bytes != 0) ranges.push_back({rows_[r].address[c], rows_[r].address[c] + bytes, r});
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  size_t widest = 0;  // the range that reaches furthest among those before
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[widest].end) {
      hosts_[ranges[i].row].overlapping = hosts_[ranges[widest].row].overlapping = true;
    }
    if (ranges[i].end > ranges[widest].end) widest = i;
  }
  written_moved_ = active_changed_ = false;
}

PyObject* Plan::written() const {
  const auto is_written = [&](size_t r) { return rows_[r].active && hosts_[r].held; };
  Py_ssize_t count = 0;
  for (size_t r = 0; r < rows_.size(); ++r) count += is_written(r);
  PyObject* list = PyList_New(count);
  count = 0;
  for (size_t r = 0; list != nullptr && r < rows_.size(); ++r) {
    if (!is_written(r)) continue;
    Py_INCREF(hosts_[r].param);
    PyList_SET_ITEM(list, count++, hosts_[r].param);
  }
  return list;
}

void Plan::release() {
  for (HostRow& host : hosts_) {
    Py_CLEAR(host.grad);
    if (!host.held) continue;
    host.held = false;
    Py_DECREF(host.param);
  }
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const HostRow& host : hosts_) {
    if (host.held) Py_VISIT(host.param);
    Py_VISIT(host.param_ref);
    Py_VISIT(host.grad);
  }
  for (const Group& group : groups_) {
    for (const Entry& entry : group.entries) {
      Py_VISIT(entry.key);
      Py_VISIT(entry.value);
    }
  }
  for (PyObject* spec : specs_) Py_VISIT(spec);
  for (PyObject* key : structural_keys_) Py_VISIT(key);
  Py_VISIT(defaults_);
  Py_VISIT(trust_ratio_);
  Py_VISIT(check_);
  return reader_.traverse(visit, arg);
}

void Plan::clear() {
  // Emptied before anything is let go of: a destructor may run Python code that meets this plan.
  std::vector<HostRow> hosts;
  std::vector<Group> groups;
  std::vector<PyObject*> keys, specs;
  specs.swap(specs_);
  hosts.swap(hosts_);
  groups.swap(groups_);
  keys.swap(structural_keys_);
  rows_.clear();
  devices_.clear();
  phases_.clear();
  for (HostRow& host : hosts) {
    Py_CLEAR(host.grad);
    if (host.held) Py_DECREF(host.param);
    Py_CLEAR(host.param_ref);
  }
  for (Group& group : groups) {
    for (Entry& entry : group.entries) {
      Py_DECREF(entry.key);
      Py_XDECREF(entry.value);
    }
  }
  for (PyObject* spec : specs) Py_XDECREF(spec);
  for (PyObject* key : keys) Py_DECREF(key);
  Py_CLEAR(defaults_);
  Py_CLEAR(trust_ratio_);
  Py_CLEAR(check_);
  reader_.clear();
}

}  // namespace fused_optim
