// The plan: which memory one optimizer's step reads and writes, with which numbers.
//
// Python builds it once from the param groups. Each step calls refresh(), which reads again what a user may
// have changed: every address and layout, every hyperparameter; then reduce(), where norms are needed, and
// apply().
//
// plan.cpp builds the table and goes through it at each refresh: groups.cpp reads hyperparameters, rows.cpp
// tensors, overlaps.cpp finds rows that write the same memory. phases.cpp takes a step through cpu/ and
// cuda/. tensor_reader reads where a tensor lies, by the structures of dlpack.h; rule_names has what Python
// calls a rule's states and hyperparameters. triton_table.h is the table of rows that Triton's kernels step.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>
#include <vector>

#include "cpu/phases.h"
#include "cuda/phases.h"
#include "plan/groups.h"
#include "plan/rows.h"
#include "plan/tensor_reader.h"
#include "row.h"

namespace fused_optim {

class Plan {
 public:
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() { clear(); }

  // All PyObject* results are new references; null means that a Python error is set.

  // make_room: None, or called where a device has no memory left: gives back what torch holds and does not
  // use.
  bool open(PyObject* exchange_api, PyObject* kind_of, PyObject* same_placement, PyObject* describe,
            PyObject* current_stream, PyObject* negative_bit, PyObject* tensor_shim, PyObject* make_room,
            const CpuKernels* kernels);

  // rules: the rule's name of each group. rows: the Row (fused_optim/row.py) of each parameter, in the order
  // of the groups. triton_rows: for each device the indices of its rows that Triton steps; this plan only
  // reads them. defaults: hyperparameters that a group may lack. structural: group keys for which a change
  // between true and false calls for a new plan. trust_ratio: None, or called with a group whose items have
  // changed: returns its TrustRatio (fused_optim/rule/trust_ratio.py) or None. limits: a dict from keys of
  // groups to the least and the greatest number. check: None, or called with the index and the group where a
  // hyperparameter cannot be used: raises what there is to say.
  bool build(PyObject* rules, PyObject* rows, PyObject* triton_rows, PyObject* defaults, PyObject* structural,
             PyObject* trust_ratio, PyObject* limits, PyObject* check);

  // Reads everything again and changes nothing. None: the groups no longer are those of the plan, build a new
  // one. Otherwise a sequence of (row index, reason): rows with a gradient that no native backend takes as
  // they are.
  PyObject* refresh(PyObject* param_groups, PyObject* state);

  // The norms that a clip or a rule needs, of all rows that refresh accepted. step: fused_optim/plan/step.py.
  // *sum: that of squares over those that take part in clipping; waits for the devices that have some of
  // them, if they exchange nothing. Throws std::runtime_error; false with a Python error set.
  bool reduce(PyObject* step, double* sum);

  // Whether the last reduce() of a step with finds_inf met a gradient element on the host that is not finite;
  // a CUDA device writes its answer where its DeviceStep says.
  bool non_finite() const { return host_->non_finite(); }

  // What the kernels of a device whose rows Triton steps read, as refresh found it: see plan/triton_table.h.
  void write_table(size_t device, int64_t* words) const;

  // The step of all rows that refresh accepted; the step's global norm is that of all gradients, those of
  // eager rows and of Triton's included. Throws std::runtime_error; false with a Python error set.
  bool apply(PyObject* step);

  // Lets go of the parameters and gradients that refresh() holds: between steps a plan keeps none alive.
  void release();

  // Whether torch's stream on a device of a row is being captured into a graph; valid after refresh.
  bool captured() const;

  // The norms of the last apply(): (row index, grad norm, param norm, trust ratio) of each row that it
  // stepped and of which it measured any. On a CUDA device the numbers are where its DeviceStep says, in the
  // order of its rows; here they are 0, and without such an address the row is not listed.
  PyObject* norms() const;

  // The parameters that the last apply() wrote; before release().
  PyObject* written() const;

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  bool read_triton_rows(PyObject* devices);
  void make_phases();
  void collect();

  TensorReader reader_;
  const CpuKernels* kernels_ = nullptr;
  std::vector<HostRow> hosts_;
  std::vector<Row> rows_;
  RowReader row_reader_{reader_, hosts_};
  GroupReader group_reader_{reader_};
  std::vector<std::unique_ptr<Phases>> phases_;  // the host's first, then the devices'
  CpuPhases* host_ = nullptr;
  std::vector<CudaPhases*> devices_;
  std::vector<std::vector<size_t>> triton_rows_;
  bool collected_ = false;      // the phases know what refresh() has found
  bool has_direction_ = false;  // of some rule
  PyObject* make_room_ = nullptr;
  int64_t active_elements_ = 0;
  int64_t active_rows_ = 0;
  bool active_changed_ = true;
};

}  // namespace fused_optim
