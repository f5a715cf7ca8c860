// The groups' hyperparameters, as the rules' kernels take them.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <vector>

#include "plan/rule_names.h"
#include "plan/tensor_reader.h"
#include "prepare.h"

namespace fused_optim {

class GroupReader {
 public:
  explicit GroupReader(TensorReader& reader) : reader_(reader) {}

  // See Plan::build. False with a Python error set.
  bool open(PyObject* rules, PyObject* defaults, PyObject* structural, PyObject* trust_ratio,
            PyObject* limits, PyObject* check);

  // One more row of a group. device: where it is, if a native backend takes it.
  void add_row(size_t index, const dlpack::Device* device);

  // From now on a tensor on the device of a group's rows is left for their kernels to read.
  void leave_device_tensors() { device_tensors_ = true; }

  size_t size() const { return groups_.size(); }
  int rule_of(size_t index) const { return groups_[index].rule; }
  size_t row_count(size_t index) const { return groups_[index].row_count; }

  enum class Read { ok, stale, error };
  // What may have changed in a group; *params: the list of its parameters. stale: the group calls for a new
  // plan. error: with a Python error set, of a hyperparameter that cannot be used.
  Read refresh(PyObject* group, size_t index, PyObject** params);

  // Of each group what was read last. The vectors stay where they are.
  const std::vector<GroupHyper>& hypers() const { return hypers_; }
  // Those that are read on the rows' device.
  const std::vector<HyperTensors>& tensors() const { return tensors_; }

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Entry {
    PyObject* key;
    PyObject* value;  // null: whatever it is, the rule does not read it
  };
  struct Limits {
    double least, most;
    bool any;  // of any number; the other two do not count
  };
  struct Group {
    int rule = 0;
    std::vector<Limits> limits;  // of each hyperparameter of the rule
    size_t row_count = 0;
    std::vector<dlpack::Device> devices;  // of its rows
    std::vector<Entry> entries;           // the group's items when it was last read
    std::vector<int> structural;          // truth of the structural keys' values then
    bool constant = false;                // no value can change while its object stays
  };

  bool parse(PyObject* group, size_t index, bool* stale);
  bool read_limits(PyObject* limits, Group& group);
  bool read_trust_ratio(PyObject* group, TrustRatio* out);
  bool number(PyObject* value, double* out);
  bool choice(PyObject* value, const HyperField& field, double* out);
  bool is_on_device_of_rows(const Group& group, const TensorView& view) const;
  bool refuse(PyObject* group, size_t index);

  TensorReader& reader_;
  std::vector<Group> groups_;
  std::vector<GroupHyper> hypers_;
  std::vector<HyperTensors> tensors_;
  bool device_tensors_ = false;
  PyObject* defaults_ = nullptr;
  PyObject* trust_ratio_ = nullptr;
  PyObject* check_ = nullptr;
  std::vector<PyObject*> structural_keys_;
};

}  // namespace fused_optim
