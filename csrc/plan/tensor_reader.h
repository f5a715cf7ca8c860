// Reads where a torch tensor lies and how, without linking torch.
//
// Torch's C shim answers in a quarter of the time that the DLPack C exchange API takes, which torch 2.10 and
// later have: it counts no reference. What is not strided is left to the exchange API. Without either a
// Python callable answers the same questions, some hundred times slower.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "plan/dlpack.h"
#include "plan/trail.h"
#include "row.h"

namespace fused_optim {

struct TensorView {
  uint64_t address;
  dlpack::Device device;
  DType dtype;  // none: a type that no rule computes with
  int32_t ndim;
  const int64_t* shape;  // valid until the next read
  const int64_t* strides;
};

// Whether a rule computes with it.
inline bool is_number(DType dtype) {
  return dtype != DType::none && dtype != DType::remainder && !is_byte(dtype);
}

inline bool is_same(const dlpack::Device& device, const dlpack::Device& other) {
  return device.device_type == other.device_type && device.device_id == other.device_id;
}

// Where a tensor's pending negation stands, which DLPack does not know: a bit of the key set in torch's
// TensorImpl. `handle`: of the TensorImpl's address in the Python object; `keys`: of the word in the
// TensorImpl. Found by `negative_bit` in fused_optim/tensors.py; a mask of 0: not found, the tensor is asked.
struct NegativeBit {
  uint64_t handle = 0, keys = 0;
  uint64_t mask = 0;
};

// Functions of torch's C shim for one tensor, which is handed over as the address of a word that holds its
// TensorImpl's. Found and tried by fused_optim/plan/tensor_shim.py.
struct TensorShim {
  // Writes its answer; 0: there is one.
  template <class Answer>
  using Function = int32_t (*)(const void* tensor, Answer* out);

  uint64_t handle = 0;   // where the word stands in a Python object
  uint64_t storage = 0;  // where a TensorImpl has its StorageImpl's address: a hint, 0 if that is not known
  Function<int32_t> layout = nullptr;  // null: there is no shim
  Function<int32_t> dtype = nullptr, device_type = nullptr, device_index = nullptr;
  Function<int64_t> dim = nullptr, storage_size = nullptr;
  Function<uint64_t> data_ptr = nullptr;
  Function<const int64_t*> sizes = nullptr, strides = nullptr;
  int32_t strided = 0, cpu = 0, cuda = 0;  // torch's numbers for them; cuda is -1 where that means another
  std::vector<DType> dtypes;               // by torch's number
};

// What stands behind an object of a Python type.
enum class TensorKind : uint8_t {
  other,    // nothing that may be read
  plain,    // a tensor in plain memory
  sharded,  // a DTensor: its memory is that of its local tensor
};

// The table of functions in a capsule, torch.Tensor.__dlpack_c_exchange_api__ or None; null where there is
// none that this code knows. False with a Python error set.
bool known_exchange_api(PyObject* capsule, const dlpack::ExchangeApi*& api);

class TensorReader {
 public:
  // `capsule`: torch.Tensor.__dlpack_c_exchange_api__ or None. `kind_of(type)` returns a TensorKind
  // as a number. `same_placement(spec, spec)` says whether two DTensors of these specs lie in the same way.
  // `describe(tensor)` returns (address, device type, device index, type code, bits,
  // shape, strides) or None. `current_stream(index)` returns the address of torch's stream on a CUDA device.
  // `negative_bit`: a NegativeBit of fused_optim/tensors.py, `tensor_shim`: a TensorShim, or None. Returns
  // false with a Python error set.
  bool open(PyObject* capsule, PyObject* kind_of, PyObject* same_placement, PyObject* describe,
            PyObject* current_stream, PyObject* negative_bit, PyObject* tensor_shim);

  // A new refresh, which most likely reads what the last one read.
  void begin() { trail_.begin(); }

  // Of a state's dict, which is read next.
  void pass_dict(PyObject* dict) {
    const auto* body = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
    trail_.pass({reinterpret_cast<const char*>(dict), body, body});
  }

  // The stream that torch works on now on a CUDA device. False with a Python error set.
  bool read_stream(int device, void** stream) const;

  TensorKind kind_of(PyTypeObject* type) {
    for (const KnownType& known : known_types_) {
      if (known.type == type) return known.kind;
    }
    return ask_kind(type);
  }

  // False if the object is not a tensor in plain memory, or one whose numbers are the negatives of those in
  // memory; no Python error is left behind.
  bool read(PyObject* object, TensorView& view) {
    return kind_of(Py_TYPE(object)) == TensorKind::plain && read_plain(object, view);
  }

  // The memory that this process has of a DTensor, and how the whole lies: borrowed from the object.
  bool read_local(PyObject* object, TensorView& view, PyObject** spec);

  // Whether DTensors of these specs lie in the same way: 1 or 0; -1 with a Python error set.
  int same_placement(PyObject* spec, PyObject* other) const;

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  TensorKind ask_kind(PyTypeObject* type);
  bool read_plain(PyObject* object, TensorView& view);
  bool read_by_shim(PyObject* object, TensorView& view);
  bool is_negative(PyObject* tensor) const {
    if (negative_bit_.mask == 0) return ask_negative(tensor);
    const char* impl;
    uint64_t keys;
    std::memcpy(&impl, reinterpret_cast<const char*>(tensor) + negative_bit_.handle, sizeof impl);
    std::memcpy(&keys, impl + negative_bit_.keys, sizeof keys);
    return (keys & negative_bit_.mask) != 0;
  }
  static bool ask_negative(PyObject* tensor);
  static bool has_memory(PyObject* tensor);
  bool read_slowly(PyObject* object, TensorView& view);
  void find_slots(PyTypeObject* type);

  const dlpack::ExchangeApi* api_ = nullptr;
  PyObject* kind_of_ = nullptr;
  PyObject* same_placement_ = nullptr;
  PyObject* describe_ = nullptr;
  PyObject* current_stream_ = nullptr;
  NegativeBit negative_bit_;
  TensorShim shim_;
  Trail trail_;
  struct KnownType {
    PyTypeObject* type;
    TensorKind kind;
  };
  std::vector<KnownType> known_types_;
  std::vector<int64_t> slow_sizes_;
  // Where a DTensor keeps its local tensor and its spec.
  PyTypeObject* sharded_type_ = nullptr;
  Py_ssize_t local_slot_ = 0, spec_slot_ = 0;
};

}  // namespace fused_optim
