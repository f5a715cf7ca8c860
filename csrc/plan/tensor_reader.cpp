#include "plan/tensor_reader.h"

#include <structmember.h>  // PyMemberDef, until Python 3.12

#include "plan/attributes.h"

namespace fused_optim {
namespace {

// No process has memory below it, but where its address space is one of 39 bits: of a view into a storage
// that was freed DLPack tells the offset as the address.
constexpr uint64_t kLeastAddress = uint64_t{1} << 44;

DType dtype_of(uint8_t code, uint8_t bits) {
  if (code == dlpack::kFloat && bits == 32) return DType::float32;
  if (code == dlpack::kBfloat && bits == 16) return DType::bfloat16;
  if (code == dlpack::kFloat && bits == 16) return DType::float16;
  if (code == dlpack::kFloat && bits == 64) return DType::float64;
  if (code == dlpack::kInt && bits == 16) return DType::remainder;
  if (code == dlpack::kInt && bits == 8) return DType::int8;
  if (code == dlpack::kUInt && bits == 8) return DType::uint8;
  return DType::none;
}

// Where objects of a type keep a slot; 0 if that is not known.
Py_ssize_t slot_of(PyTypeObject* type, const char* name) {
  PyObject* descriptor = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name);
  if (descriptor == nullptr) PyErr_Clear();
  Py_ssize_t offset = 0;
  if (descriptor != nullptr && Py_TYPE(descriptor) == &PyMemberDescr_Type) {
    const auto* member = reinterpret_cast<PyMemberDescrObject*>(descriptor);
    if (PyType_IsSubtype(type, member->d_common.d_type)) offset = member->d_member->offset;
  }
  Py_XDECREF(descriptor);
  return offset;
}

PyObject* in_slot(PyObject* object, Py_ssize_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
}

bool read_negative_bit(PyObject* object, NegativeBit& out) {
  Attributes attributes(object);
  attributes.read(intern("handle"), out.handle);
  attributes.read(intern("keys"), out.keys);
  attributes.read(intern("mask"), out.mask);
  return attributes.good();
}

template <class Function>
void read_function(Attributes& attributes, const char* name, Function& out) {
  uint64_t address = 0;
  attributes.read(intern(name), address);
  out = reinterpret_cast<Function>(address);
}

bool read_shim(PyObject* object, TensorShim& out) {
  Attributes attributes(object);
  attributes.read(intern("handle"), out.handle);
  attributes.read(intern("storage"), out.storage);
  attributes.read(intern("strided"), out.strided);
  attributes.read(intern("cpu"), out.cpu);
  attributes.read(intern("cuda"), out.cuda);
  read_function(attributes, "dtype", out.dtype);
  read_function(attributes, "device_type", out.device_type);
  read_function(attributes, "device_index", out.device_index);
  read_function(attributes, "dim", out.dim);
  read_function(attributes, "storage_size", out.storage_size);
  read_function(attributes, "data_ptr", out.data_ptr);
  read_function(attributes, "sizes", out.sizes);
  read_function(attributes, "strides", out.strides);
  attributes.read(intern("dtypes"), [&](PyObject* numbers) {
    char* bytes;
    Py_ssize_t count;
    if (PyBytes_AsStringAndSize(numbers, &bytes, &count) != 0) return;
    for (Py_ssize_t i = 0; i < count; ++i) out.dtypes.push_back(static_cast<DType>(bytes[i]));
  });
  read_function(attributes, "layout", out.layout);
  return attributes.good();
}

}  // namespace

bool known_exchange_api(PyObject* capsule, const dlpack::ExchangeApi*& api) {
  api = nullptr;
  if (capsule == Py_None) return true;
  const auto* found =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
  if (found == nullptr) return false;
  // Of another ABI nothing is used: the slow way is right whatever the version.
  const bool known = found->header.version.major == dlpack::kMajorVersion;
  if (known && found->dltensor_from_py_object_no_sync != nullptr) api = found;
  return true;
}

bool TensorReader::open(PyObject* capsule, PyObject* kind_of, PyObject* same_placement, PyObject* describe,
                        PyObject* current_stream, PyObject* negative_bit, PyObject* tensor_shim) {
  if (!known_exchange_api(capsule, api_)) return false;
  if (negative_bit != Py_None && !read_negative_bit(negative_bit, negative_bit_)) return false;
  if (tensor_shim != Py_None && !read_shim(tensor_shim, shim_)) return false;
  Py_INCREF(kind_of);
  kind_of_ = kind_of;
  Py_INCREF(same_placement);
  same_placement_ = same_placement;
  Py_INCREF(describe);
  describe_ = describe;
  Py_INCREF(current_stream);
  current_stream_ = current_stream;
  return true;
}

bool TensorReader::read_stream(int device, void** stream) const {
  if (api_ != nullptr && api_->current_work_stream != nullptr) {
    return api_->current_work_stream(dlpack::kCUDA, device, stream) == 0;
  }
  PyObject* address = PyObject_CallFunction(current_stream_, "i", device);
  if (address == nullptr) return false;
  *stream = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  return !PyErr_Occurred();
}

TensorKind TensorReader::ask_kind(PyTypeObject* type) {
  PyObject* answer = PyObject_CallFunctionObjArgs(kind_of_, reinterpret_cast<PyObject*>(type), nullptr);
  const long number = answer == nullptr ? 0 : PyLong_AsLong(answer);
  Py_XDECREF(answer);
  if (PyErr_Occurred()) PyErr_Clear();
  auto kind = number == 1 ? TensorKind::plain : number == 2 ? TensorKind::sharded : TensorKind::other;
  if (kind == TensorKind::sharded) {
    find_slots(type);
    if (type != sharded_type_) kind = TensorKind::other;
  }
  Py_INCREF(type);  // a type that died could leave its address to another
  known_types_.push_back({type, kind});
  return kind;
}

void TensorReader::find_slots(PyTypeObject* type) {
  local_slot_ = slot_of(type, "_local_tensor");
  spec_slot_ = slot_of(type, "_spec");
  if (local_slot_ != 0 && spec_slot_ != 0) sharded_type_ = type;
}

bool TensorReader::read_local(PyObject* object, TensorView& view, PyObject** spec) {
  if (kind_of(Py_TYPE(object)) != TensorKind::sharded) return false;
  PyObject* local = in_slot(object, local_slot_);
  if (local == nullptr || !read(local, view)) return false;
  *spec = in_slot(object, spec_slot_);
  return *spec != nullptr;
}

int TensorReader::same_placement(PyObject* spec, PyObject* other) const {
  PyObject* answer = PyObject_CallFunctionObjArgs(same_placement_, spec, other, nullptr);
  const int truth = answer == nullptr ? -1 : PyObject_IsTrue(answer);
  Py_XDECREF(answer);
  return truth;
}

// False: the shim has no answer, or none without an exception within torch: the tensor is not strided.
bool TensorReader::read_by_shim(PyObject* object, TensorView& view) {
  const auto* const start = reinterpret_cast<const char*>(object);
  const char* const tensor = start + shim_.handle;
  const char *impl, *storage;
  std::memcpy(&impl, tensor, sizeof impl);
  std::memcpy(&storage, impl + shim_.storage, sizeof storage);
  trail_.pass({start, impl, storage});
  int32_t layout, dtype, device, index = 0;
  int64_t size, dim;
  if (shim_.layout(tensor, &layout) != 0 || layout != shim_.strided) return false;
  if (shim_.device_type(tensor, &device) != 0 || (device != shim_.cpu && device != shim_.cuda)) return false;
  if (shim_.dtype(tensor, &dtype) != 0 || shim_.dim(tensor, &dim) != 0 ||
      shim_.storage_size(tensor, &size) != 0 || shim_.data_ptr(tensor, &view.address) != 0 ||
      shim_.sizes(tensor, &view.shape) != 0 || shim_.strides(tensor, &view.strides) != 0 ||
      (device == shim_.cuda && shim_.device_index(tensor, &index) != 0)) {
    return false;
  }
  if (size == 0) view.address = 0;  // memory that was taken away: the offset alone would be left
  view.device = {device == shim_.cpu ? dlpack::kCPU : dlpack::kCUDA, index};
  const auto number = static_cast<size_t>(dtype);
  view.dtype = number < shim_.dtypes.size() ? shim_.dtypes[number] : DType::none;
  view.ndim = static_cast<int32_t>(dim);
  return true;
}

bool TensorReader::read_plain(PyObject* object, TensorView& view) {
  if (shim_.layout != nullptr && read_by_shim(object, view)) return !is_negative(object);
  if (api_ == nullptr) return read_slowly(object, view);
  dlpack::Tensor tensor;
  if (api_->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (is_negative(object)) return false;  // DLPack has handed out the address of the raw numbers
  view.address = reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset;
  if (view.address < kLeastAddress && !has_memory(object)) view.address = 0;
  view.device = tensor.device;
  view.dtype = dtype_of(tensor.dtype.code, tensor.dtype.bits);
  view.ndim = tensor.ndim;
  view.shape = tensor.shape;
  view.strides = tensor.strides;
  return true;
}

// Whether a tensor's storage has any byte. What cannot be asked has none.
bool TensorReader::has_memory(PyObject* tensor) {
  static PyObject* const storage_name = intern("untyped_storage");
  static PyObject* const bytes_name = intern("nbytes");
  const Owned storage(PyObject_CallMethodNoArgs(tensor, storage_name));
  const Owned bytes(storage ? PyObject_CallMethodNoArgs(storage.get(), bytes_name) : nullptr);
  const bool any = bytes && PyObject_IsTrue(bytes.get()) == 1;
  if (PyErr_Occurred()) PyErr_Clear();
  return any;
}

bool TensorReader::ask_negative(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* answer = PyObject_CallMethodNoArgs(tensor, name);
  const bool positive = answer == Py_False;
  Py_XDECREF(answer);
  if (PyErr_Occurred()) PyErr_Clear();
  return !positive;
}

bool TensorReader::read_slowly(PyObject* object, TensorView& view) {
  PyObject* facts = PyObject_CallFunctionObjArgs(describe_, object, nullptr);
  unsigned long long address;
  int device_type, device_id, code, bits;
  PyObject *shape, *strides;
  bool good = facts != nullptr && facts != Py_None &&
              PyArg_ParseTuple(facts, "KiiiiO!O!", &address, &device_type, &device_id, &code, &bits,
                               &PyTuple_Type, &shape, &PyTuple_Type, &strides);
  if (good) {
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
    slow_sizes_.resize(static_cast<size_t>(2 * ndim));
    for (Py_ssize_t i = 0; i < ndim; ++i) {
      slow_sizes_[static_cast<size_t>(i)] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      slow_sizes_[static_cast<size_t>(ndim + i)] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    view.address = address;
    view.device = {device_type, device_id};
    view.dtype = dtype_of(static_cast<uint8_t>(code), static_cast<uint8_t>(bits));
    view.ndim = static_cast<int32_t>(ndim);
    view.shape = slow_sizes_.data();
    view.strides = slow_sizes_.data() + ndim;
    good = !PyErr_Occurred();
  }
  Py_XDECREF(facts);
  if (PyErr_Occurred()) PyErr_Clear();
  return good;
}

int TensorReader::traverse(visitproc visit, void* arg) const {
  Py_VISIT(kind_of_);
  Py_VISIT(same_placement_);
  Py_VISIT(describe_);
  Py_VISIT(current_stream_);
  for (const KnownType& known : known_types_) Py_VISIT(known.type);
  return 0;
}

void TensorReader::clear() {
  Py_CLEAR(kind_of_);
  Py_CLEAR(same_placement_);
  Py_CLEAR(describe_);
  Py_CLEAR(current_stream_);
  std::vector<KnownType> types;
  types.swap(known_types_);
  for (const KnownType& known : types) Py_DECREF(known.type);
}

}  // namespace fused_optim
