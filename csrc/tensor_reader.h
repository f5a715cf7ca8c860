// Reads where a torch tensor lies and how, without linking torch.
//
// Torch 2.10 and later hand out a C function for this (the DLPack C exchange API, 13 ns a tensor). For an
// older torch a Python callable answers the same questions, some hundred times slower.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <vector>

#include "dlpack.h"
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

class TensorReader {
 public:
  // `capsule`: torch.Tensor.__dlpack_c_exchange_api__ or None. `is_plain(type)` says whether tensors of a
  // type are plain memory. `describe(tensor)` returns (address, device type, device index, type code, bits,
  // shape, strides) or None. `current_stream(index)` returns the address of torch's stream on a CUDA device.
  // Returns false with a Python error set.
  bool open(PyObject* capsule, PyObject* is_plain, PyObject* describe, PyObject* current_stream);

  // The stream that torch works on now on a CUDA device. False with a Python error set.
  bool read_stream(int device, void** stream) const;

  // False if the object is not a tensor in plain memory; no Python error is left behind.
  bool read(PyObject* object, TensorView& view);

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  bool is_plain_type(PyTypeObject* type);
  bool ask_whether_plain(PyTypeObject* type);
  bool read_slowly(PyObject* object, TensorView& view);

  const dlpack::ExchangeApi* api_ = nullptr;
  PyObject* is_plain_ = nullptr;
  PyObject* describe_ = nullptr;
  PyObject* current_stream_ = nullptr;
  struct KnownType {
    PyTypeObject* type;
    bool plain;
  };
  std::vector<KnownType> known_types_;
  std::vector<int64_t> slow_sizes_;
};

}  // namespace fused_optim
