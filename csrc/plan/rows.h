// The tensors of a row: parameter, gradient, master weight and states.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <vector>

#include "plan/tensor_reader.h"
#include "row.h"

namespace fused_optim {

// What the host knows of a row beside the numbers that kernels read.
struct HostRow {
  PyObject* param = nullptr;                   // borrowed, and compared only, unless it is held
  PyObject* param_ref = nullptr;               // weak: tells the reader when the parameter dies
  PyObject* grad = nullptr;                    // held from refresh() to release(), and
  bool held = false;                           // so is the parameter, if it has one
  PyTypeObject* type = nullptr;                // of the parameter; borrowed, compared only
  PyGetSetDescrObject* grad_getter = nullptr;  // torch's own, where the type has not replaced it; borrowed
  PyObject* master_key = nullptr;              // state key of the master weight, if the row has one; immortal
  bool native = false;
  bool is_triton = false;  // Triton steps it
  bool sharded = false;    // its tensors are DTensors
  bool overlapping = false;
  bool counts = false;             // its rule counts no steps, and its random words need a count
  bool holds_groups = false;       // its elements lie in their order, and its rows hold whole groups of codes
  DType formats[kMaxStates] = {};  // of its states of a number an element, where they are new
  DType master_format = DType::none;
  int32_t ndim = 0;
  size_t layout = 0;  // where the reader keeps its shape and strides
  size_t specs = 0;   // of a sharded row: where the reader keeps those of its columns
  dlpack::Device device{};
  Py_ssize_t state_position = 0;  // where PyDict_Next finds the row's state
};

class RowReader {
 public:
  // hosts: of all rows.
  RowReader(TensorReader& reader, std::vector<HostRow>& hosts) : reader_(reader), hosts_(hosts) {}

  // Reads a Row of fused_optim/row.py. False with a Python error set.
  bool add(PyObject* object, HostRow& host, Row& row);

  // A new refresh.
  void begin() {
    states_located_ = false;
    reader_.begin();
  }

  // Whether a parameter has died: another one may have its address.
  bool any_has_died() const { return has_died_ != nullptr && *has_died_; }

  // A new reference; null with a Python error set.
  static PyObject* grad_of(const HostRow& host);

  // Reads the addresses and dtypes of a row that has a gradient. Null: the row is ready. "": the parameter is
  // no longer what the plan was built for. Otherwise what is wrong.
  const char* refresh(HostRow& host, Row& row, PyObject* state);

  // Whether an address that the step writes has changed since the last call.
  bool written_moved() {
    const bool moved = written_moved_;
    written_moved_ = false;
    return moved;
  }

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  const char* read_states(HostRow& host, Row& row, PyObject* state);
  const char* read_number(const HostRow& host, PyObject* value, TensorView& view) const;
  const char* read_state(const HostRow& host, Row& row, int column, DType format, PyObject* value);
  const char* read_scale(const HostRow& host, const Row& row, PyObject* value, uint64_t* address);
  bool is_on_device_of(const HostRow& host, const TensorView& view) const;
  void put(uint64_t& address, uint64_t found);
  PyObject* find_state(HostRow& host, PyObject* state);
  void locate_states(PyObject* state);
  PyObject* death_callback();
  bool read_column(const HostRow& host, int column, PyObject* object, TensorView& view);
  bool same_layout(const HostRow& host, const TensorView& view) const;

  TensorReader& reader_;
  std::vector<HostRow>& hosts_;
  std::vector<int64_t> layouts_;
  std::vector<PyObject*> specs_;        // of the DTensors that sharded rows have accepted: kColumns a row
  PyObject* death_callback_ = nullptr;  // of all weak references
  const bool* has_died_ = nullptr;      // what it writes
  bool written_moved_ = false;
  bool states_located_ = false;
};

}  // namespace fused_optim
