#include "plan/rows.h"

#include <memory>
#include <unordered_map>

#include "codec.h"
#include "plan/attributes.h"
#include "plan/rule_names.h"

namespace fused_optim {
namespace {

PyObject* grad_name() {
  static PyObject* const name = intern("grad");
  return name;
}

DType dtype_numbered(PyObject* number) { return static_cast<DType>(PyLong_AsLong(number)); }

// Whether a tensor's elements lie in their order, and each index of its first dimension holds whole groups.
bool holds_whole_groups(const TensorView& view) {
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] != 1 && view.strides[i] != expected) return false;
    if (i > 0) expected *= view.shape[i];
  }
  return view.ndim > 0 && expected % kGroup == 0;
}

// Notes the death of a parameter where the plan looks.
PyObject* note_death(PyObject* capsule, PyObject*) {
  *static_cast<bool*>(PyCapsule_GetPointer(capsule, nullptr)) = true;
  Py_RETURN_NONE;
}

PyMethodDef note_death_method{"note_death", note_death, METH_O, nullptr};

}  // namespace

// Its memory is the capsule's: a weak reference that another holder has found may outlive the plan.
PyObject* RowReader::death_callback() {
  if (death_callback_ != nullptr) return death_callback_;
  auto has_died = std::make_unique<bool>(false);
  const Owned capsule(PyCapsule_New(has_died.get(), nullptr, [](PyObject* object) {
    delete static_cast<bool*>(PyCapsule_GetPointer(object, nullptr));
  }));
  if (!capsule) return nullptr;
  has_died_ = has_died.release();
  return death_callback_ = PyCFunction_New(&note_death_method, capsule.get());
}

bool RowReader::add(PyObject* object, HostRow& host, Row& row) {
  static PyObject* const group = intern("group");
  static PyObject* const param_name = intern("param");
  static PyObject* const lr_scale = intern("lr_scale");
  static PyObject* const weight_decay_scale = intern("weight_decay_scale");
  static PyObject* const is_native = intern("native");
  static PyObject* const clipped = intern("clipped");
  static PyObject* const has_trust_ratio = intern("has_trust_ratio");
  static PyObject* const master = intern("master");
  static PyObject* const direction_column = intern("direction_column");
  static PyObject* const direction_address = intern("direction_address");
  static PyObject* const direction_dtype = intern("direction_dtype");
  static PyObject* const master_format = intern("master_format");
  static PyObject* const formats = intern("formats");
  static PyObject* const draws = intern("draws");
  static PyObject* const counts = intern("counts");
  static PyObject* const stochastic = intern("stochastic");
  static PyObject* const seed = intern("seed");
  static PyObject* const place = intern("place");
  static PyObject* const first = intern("first");
  bool native = false;
  int32_t column = 0, dtype = 0;
  uint64_t address = 0;
  Attributes attributes(object);
  attributes.read(group, row.group);
  attributes.read(lr_scale, row.lr_scale);
  attributes.read(weight_decay_scale, row.weight_decay_scale);
  attributes.read(is_native, native);
  attributes.read(clipped, row.clipped);
  attributes.read(has_trust_ratio, row.has_trust_ratio);
  attributes.read(direction_column, column);
  attributes.read(direction_address, address);
  attributes.read(direction_dtype, dtype);
  attributes.read(master, [&](PyObject* key) {
    const char* text = key == Py_None ? nullptr : PyUnicode_AsUTF8(key);
    if (text != nullptr) host.master_key = intern(text);
  });
  attributes.read(master_format, [&](PyObject* value) { host.master_format = dtype_numbered(value); });
  attributes.read(formats, [&](PyObject* values) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values) && i < kMaxStates; ++i) {
      host.formats[i] = dtype_numbered(PyTuple_GET_ITEM(values, i));
    }
  });
  attributes.read(draws, row.draws);
  attributes.read(counts, host.counts);
  attributes.read(stochastic, row.stochastic);
  attributes.read(seed,
                  [&](PyObject* value) { row.seed = static_cast<uint32_t>(PyLong_AsUnsignedLong(value)); });
  attributes.read(place,
                  [&](PyObject* value) { row.place = static_cast<uint32_t>(PyLong_AsUnsignedLong(value)); });
  attributes.read(first, [&](PyObject* value) { row.first = PyLong_AsLongLong(value); });
  const Owned owned_param(attributes.good() ? PyObject_GetAttr(object, param_name) : nullptr);
  PyObject* const param = owned_param.get();
  if (param == nullptr) return false;
  if (address != 0) {
    row.address[column] = address;
    row.dtype[column] = static_cast<DType>(dtype);
  }
  host.type = Py_TYPE(param);
  PyObject* descriptor = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(param)), grad_name());
  if (descriptor == nullptr) return false;
  if (Py_TYPE(descriptor) == &PyGetSetDescr_Type && Py_TYPE(param)->tp_getattro == PyObject_GenericGetAttr) {
    host.grad_getter = reinterpret_cast<PyGetSetDescrObject*>(descriptor);  // its type outlives the parameter
  }
  Py_DECREF(descriptor);
  TensorView view;
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
    host.holds_groups = row.numel == 0 || holds_whole_groups(view);
  }
  PyObject* const callback = death_callback();
  if (callback == nullptr) return false;
  host.param = param;
  host.param_ref = PyWeakref_NewRef(param, callback);
  if (host.param_ref == nullptr) return false;
  return true;
}

// torch's getter called directly: 15 ns less than through the attribute lookup.
PyObject* RowReader::grad_of(const HostRow& host) {
  if (host.grad_getter == nullptr) return PyObject_GetAttr(host.param, grad_name());
  const PyGetSetDef* definition = host.grad_getter->d_getset;
  return definition->get(host.param, definition->closure);
}

// Whether a tensor's elements lie in the order of the parameter's. The stride of a dimension of size 1 says
// nothing, and none does where there are no elements.
bool RowReader::same_layout(const HostRow& host, const TensorView& view) const {
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
bool RowReader::read_column(const HostRow& host, int column, PyObject* object, TensorView& view) {
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

const char* RowReader::refresh(HostRow& host, Row& row, PyObject* state) {
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

const char* RowReader::read_states(HostRow& host, Row& row, PyObject* state) {
  static PyObject* const step_name = intern("step");
  const RuleNames& rule = names_of_rule(row.rule);
  if (rule.state_names.empty() && host.master_key == nullptr && !host.counts) return nullptr;
  PyObject* states = find_state(host, state);
  if (states == nullptr || !PyDict_Check(states)) return "state";
  reader_.pass_dict(states);
  Py_ssize_t position = 0;
  bool in_order = true;
  const auto next = [&](PyObject* name) -> PyObject* {
    PyObject *key, *value;
    in_order = in_order && PyDict_Next(states, &position, &key, &value) && key == name;
    return in_order ? value : PyDict_GetItemWithError(states, name);
  };
  TensorView view;
  if (host.counts) {
    const char* reason = read_number(host, next(step_name), view);
    if (reason != nullptr || view.dtype != DType::float32) return "state";
    put(row.counter, view.address);
  }
  const DType* format = host.formats;
  for (size_t i = 0; i < rule.state_names.size(); ++i) {
    const int column = kFirstState + static_cast<int>(i);
    PyObject* value = next(rule.state_names[i]);
    if (rule.per_tensor[i]) {
      const char* reason = read_number(host, value, view);
      if (reason != nullptr) return reason;
      put(row.address[column], view.address);
      row.dtype[column] = view.dtype;
      continue;
    }
    const char* reason = read_state(host, row, column, *format++, value);
    if (reason != nullptr) return reason;
    uint64_t scale = 0;
    if (is_byte(row.dtype[column])) {
      reason = read_scale(host, row, next(rule.scale_names[i]), &scale);
      if (reason != nullptr) return reason;
    }
    put(row.scale[i], scale);
  }
  if (host.master_key == nullptr) return nullptr;
  return read_state(host, row, kMaster, host.master_format, next(host.master_key));
}

bool RowReader::is_on_device_of(const HostRow& host, const TensorView& view) const {
  return view.device.device_type == host.device.device_type && view.device.device_id == host.device.device_id;
}

void RowReader::put(uint64_t& address, uint64_t found) {
  if (address == found) return;
  address = found;
  written_moved_ = true;
}

// A state of one number a tensor.
const char* RowReader::read_number(const HostRow& host, PyObject* value, TensorView& view) const {
  if (value == nullptr || !reader_.read(value, view)) {
    PyErr_Clear();
    return "state";
  }
  if (!is_on_device_of(host, view)) return "state";
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] != 1) return "state";
  }
  const bool number = view.dtype == DType::float32 || view.dtype == DType::float64;
  return number && view.address != 0 ? nullptr : "state";
}

// A state of a number an element, or the master weight. format: of a new one; a 16-bit parameter may have
// other numbers.
const char* RowReader::read_state(const HostRow& host, Row& row, int column, DType format, PyObject* value) {
  TensorView view;
  if (value == nullptr || !read_column(host, column, value, view)) {
    PyErr_Clear();
    return "state";
  }
  if (!same_layout(host, view)) return "state";
  const bool other_number = column != kMaster && size_of(row.dtype[kParam]) == 2 && is_number(view.dtype) &&
                            view.dtype != DType::float64;
  if (view.dtype != format && !other_number) return "state";
  if (column != kMaster && is_byte(view.dtype) && !(row.draws && host.holds_groups)) return "state";
  if (view.address == 0 && row.numel != 0) return "state";
  put(row.address[column], view.address);
  row.dtype[column] = view.dtype;
  return nullptr;
}

// The scales of a state's codes: a byte a group, in their order, of the part that this process has.
const char* RowReader::read_scale(const HostRow& host, const Row& row, PyObject* value, uint64_t* address) {
  TensorView view;
  PyObject* spec;
  if (value == nullptr ||
      !(host.sharded ? reader_.read_local(value, view, &spec) : reader_.read(value, view))) {
    PyErr_Clear();
    return "state";
  }
  const int64_t rows = layouts_[host.layout];
  const bool fits = view.dtype == DType::uint8 && is_on_device_of(host, view) && view.ndim == 2 &&
                    view.shape[0] == rows && view.shape[0] * view.shape[1] * kGroup == row.numel;
  if (!fits) return "state";
  const bool in_order = (view.strides[1] == 1 || view.shape[1] == 1) &&
                        (view.strides[0] == view.shape[1] || view.shape[0] == 1);
  if (row.numel != 0 && (!in_order || view.address == 0)) return "state";
  *address = view.address;
  return nullptr;
}

// The parameters' states stand in a dict whose keys hash slowly (Tensor.__hash__ is Python). The row
// remembers where PyDict_Next found its state; only if that is no longer so, all positions are looked up
// again.
PyObject* RowReader::find_state(HostRow& host, PyObject* state) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    PyObject *key, *value;
    Py_ssize_t position = host.state_position;
    if (PyDict_Next(state, &position, &key, &value) && key == host.param) return value;
    if (states_located_) break;
    locate_states(state);
  }
  return nullptr;
}

void RowReader::locate_states(PyObject* state) {
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

int RowReader::traverse(visitproc visit, void* arg) const {
  for (PyObject* spec : specs_) Py_VISIT(spec);
  Py_VISIT(death_callback_);
  return 0;
}

void RowReader::clear() {
  std::vector<PyObject*> specs;
  specs.swap(specs_);
  for (PyObject* spec : specs) Py_XDECREF(spec);
  has_died_ = nullptr;
  Py_CLEAR(death_callback_);
}

}  // namespace fused_optim
