// A step of a plan: what Python says of it, and the phases of the host and of each device.
#include <algorithm>
#include <stdexcept>

#include "plan/attributes.h"
#include "plan/plan.h"
#include "plan/triton_table.h"

namespace fused_optim {
namespace {

// Below this a step is over sooner than another thread could take the interpreter lock.
constexpr int64_t kElementsUnderLock = 32 * 1024;

// Lets other Python threads run while it lives.
class Unlocked {
 public:
  explicit Unlocked(bool worth_it) {
    if (worth_it) state_ = PyEval_SaveThread();
  }
  ~Unlocked() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_ = nullptr;
};

// Calls Python's exchange, with the interpreter lock or without it.
bool call_exchange(PyObject* exchange, std::vector<Norms>* norms, int device, double* sum) {
  const PyGILState_STATE state = PyGILState_Ensure();
  {
    const Owned argument(norms == nullptr
                             ? PyLong_FromLong(device)
                             : PyMemoryView_FromMemory(reinterpret_cast<char*>(norms->data()),
                                                       static_cast<Py_ssize_t>(norms->size() * sizeof(Norms)),
                                                       PyBUF_WRITE));
    const Owned result(argument ? PyObject_CallFunctionObjArgs(exchange, argument.get(), nullptr) : nullptr);
    if (result) *sum = PyFloat_AsDouble(result.get());
  }
  const bool good = PyErr_Occurred() == nullptr;
  PyGILState_Release(state);
  return good;
}

#if defined(FO_WITH_CUDA)
// Calls Python's make_room, with the interpreter lock or without it. What it raises is not said: there is no
// room, then, and that is.
void call_make_room(PyObject* make_room) {
  const PyGILState_STATE state = PyGILState_Ensure();
  const Owned result(make_room == Py_None ? nullptr : PyObject_CallNoArgs(make_room));
  if (!result) PyErr_Clear();
  PyGILState_Release(state);
}
#endif

bool read_clip(PyObject* object, StepOptions& options) {
  static PyObject* const kind = intern("kind");
  static PyObject* const norm = intern("norm");
  static PyObject* const min = intern("min");
  static PyObject* const max = intern("max");
  int32_t number = 0;
  Attributes attributes(object);
  attributes.read(kind, number);
  attributes.read(norm, options.clip_norm);
  attributes.read(min, options.clip_min);
  attributes.read(max, options.clip_max);
  options.clip = static_cast<Clip>(number);
  return attributes.good();
}

bool read_device(PyObject* object, DeviceStep& out) {
  static PyObject* const device = intern("device");
  static PyObject* const grad_scale = intern("grad_scale");
  static PyObject* const found_inf = intern("found_inf");
  static PyObject* const grad_norm = intern("grad_norm");
  static PyObject* const non_finite = intern("non_finite");
  static PyObject* const measured = intern("measured");
  static PyObject* const exchanged = intern("exchanged");
  Attributes attributes(object);
  attributes.read(device, out.device);
  attributes.read(grad_scale, out.grad_scale);
  attributes.read(found_inf, out.found_inf);
  attributes.read(grad_norm, out.grad_norm);
  attributes.read(non_finite, out.non_finite);
  attributes.read(measured, out.measured);
  attributes.read(exchanged, out.exchanged);
  return attributes.good();
}

// The Step of fused_optim/plan/step.py; its exchange lives as long as the object.
bool read_step(PyObject* object, Step& step) {
  static PyObject* const grad_scale = intern("grad_scale");
  static PyObject* const threads = intern("threads");
  static PyObject* const clip = intern("clip");
  static PyObject* const finds_inf = intern("finds_inf");
  static PyObject* const devices = intern("devices");
  static PyObject* const exchange = intern("exchange");
  static PyObject* const global_norm = intern("global_norm");
  Attributes attributes(object);
  attributes.read(grad_scale, step.options.grad_scale);
  attributes.read(threads, step.threads);
  attributes.read(clip, [&](PyObject* value) { read_clip(value, step.options); });
  attributes.read(finds_inf, step.options.finds_inf);
  attributes.read(devices, [&](PyObject* value) {
    const Owned list(PySequence_Fast(value, "devices of a step must be a sequence"));
    const Py_ssize_t count = list ? PySequence_Fast_GET_SIZE(list.get()) : 0;
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); ++i) {
      step.devices.emplace_back();
      read_device(PySequence_Fast_GET_ITEM(list.get(), i), step.devices.back());
    }
  });
  attributes.read(exchange, [&](PyObject* value) {
    if (value == Py_None) return;
    step.exchange = [value](std::vector<Norms>* norms, int device, double* sum) {
      return call_exchange(value, norms, device, sum);
    };
  });
  attributes.read(global_norm, [&](PyObject* value) {
    if (value != Py_None) step.global_norm = PyFloat_AsDouble(value);
  });
  return attributes.good();
}

}  // namespace

void Plan::make_phases() {
  std::vector<size_t> on_host;
  std::vector<std::pair<int, std::vector<size_t>>> on_devices;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const HostRow& host = hosts_[r];
    if (host.is_triton) continue;
    if (!host.native || host.device.device_type != dlpack::kCUDA) {
      on_host.push_back(r);
      continue;
    }
    const auto has_index = [&](const auto& device) { return device.first == host.device.device_id; };
    auto found = std::find_if(on_devices.begin(), on_devices.end(), has_index);
    if (found == on_devices.end()) {
      found = on_devices.insert(found, {host.device.device_id, {}});
    }
    found->second.push_back(r);
  }
  auto host =
      std::make_unique<CpuPhases>(*kernels_, group_reader_.hypers(), rows_.size(), std::move(on_host));
  host_ = host.get();
  phases_.push_back(std::move(host));
#if defined(FO_WITH_CUDA)
  for (auto& [index, rows] : on_devices) {
    auto phases = CudaPhases::create(index, rows_, std::move(rows), group_reader_.hypers(),
                                     group_reader_.tensors(), [this] { call_make_room(make_room_); });
    devices_.push_back(phases.get());
    phases_.push_back(std::move(phases));
  }
#else
  if (!on_devices.empty()) throw std::runtime_error("fused_optim was built without CUDA");
#endif
  for (size_t g = 0; g < group_reader_.size(); ++g) {
    has_direction_ = has_direction_ || kernels_->accumulate_float[group_reader_.rule_of(g)] != nullptr;
  }
}

// Shows the phases what refresh() has found.
void Plan::collect() {
  if (collected_) return;
  for (const auto& phases : phases_) phases->collect(rows_);
  collected_ = true;
}

bool Plan::reduce(PyObject* object, double* sum) {
  Step step{};
  if (!read_step(object, step)) return false;
  const Unlocked unlocked(active_elements_ > kElementsUnderLock || !devices_.empty());
  collect();
  *sum = 0;
  const auto reduces = [&](const auto& phases) { return phases->reduce(step, sum); };
  return std::all_of(phases_.begin(), phases_.end(), reduces);
}

bool Plan::apply(PyObject* object) {
  Step step{};
  if (!read_step(object, step)) return false;
  if (!has_direction_) step.exchange = nullptr;
  const Unlocked unlocked(active_elements_ > kElementsUnderLock);
  collect();
  // The devices first: they work while the host does.
  const auto applies = [&](const auto& phases) { return phases->apply(step); };
  return std::all_of(phases_.rbegin(), phases_.rend(), applies);
}

void Plan::write_table(size_t device, int64_t* words) const {
  std::vector<Row> rows;
  for (const size_t r : triton_rows_.at(device)) rows.push_back(rows_[r]);
  write_triton_table(rows, group_reader_.hypers(), group_reader_.tensors(), words);
}

bool Plan::captured() const {
  return std::any_of(devices_.begin(), devices_.end(), [](const auto* phases) { return phases->captured(); });
}

PyObject* Plan::norms() const {
  std::vector<RowNorms> found;
  for (const auto& phases : phases_) phases->add_norms(&found);
  PyObject* list = PyList_New(0);
  for (const auto& [row, norms] : found) {
    if (list == nullptr) break;
    const Owned item(Py_BuildValue("nddd", static_cast<Py_ssize_t>(row), norms.grad_norm, norms.param_norm,
                                   norms.trust_ratio));
    if (!item || PyList_Append(list, item.get()) != 0) Py_CLEAR(list);
  }
  return list;
}

}  // namespace fused_optim
