// The plan: which memory one optimizer's step reads and writes, with which numbers.
//
// Python builds it once from the param groups. Each step calls refresh(), which reads again what a user may
// have changed: every address and layout, every hyperparameter; then reduce(), where norms are needed, and
// apply().
//
// plan.cpp builds and refreshes the table and takes a step through cpu/ and cuda/. tensor_reader reads where
// a tensor lies, by the structures of dlpack.h. triton_table.h is the table of rows that Triton's kernels
// step.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/phases.h"
#include "cuda/phases.h"
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

  bool open(PyObject* exchange_api, PyObject* kind_of, PyObject* same_placement, PyObject* describe,
            PyObject* current_stream, PyObject* negative_bit, const CpuKernels* kernels);

  // rules: the rule's name of each group. rows: the Row (fused_optim/row.py) of each parameter, in the order
  // of the groups. triton_rows: for each device the indices of its rows that Triton steps; this plan only
  // reads them. defaults: hyperparameters that a group may lack. structural: group keys for which a change
  // between true and false calls for a new plan. trust_ratio: None, or called with a group whose items have
  // changed: returns its TrustRatio (fused_optim/trust_ratio.py) or None. limits: a dict from keys of groups
  // to the least and the greatest number. check: None, or called with the index and the group where a
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

  // The step of all rows that refresh accepted; the step's global norm is that of all gradients, those that
  // others step included. Throws std::runtime_error; false with a Python error set.
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
  struct HostRow {
    PyObject* param = nullptr;                   // borrowed, and compared only, unless it is held
    PyObject* param_ref = nullptr;               // weak: says whether that still is the parameter
    PyObject* grad = nullptr;                    // held from refresh() to release(), and
    bool held = false;                           // so is the parameter, if it has one
    PyTypeObject* type = nullptr;                // of the parameter; borrowed, compared only
    PyGetSetDescrObject* grad_getter = nullptr;  // torch's own, where the type has not replaced it; borrowed
    PyObject* master_key = nullptr;  // state key of the master weight, if the row has one; immortal
    bool native = false;
    bool is_triton = false;  // Triton steps it
    bool sharded = false;    // its tensors are DTensors
    bool overlapping = false;
    int32_t ndim = 0;
    size_t layout = 0;  // where shape and strides stand in layouts_
    size_t specs = 0;   // of a sharded row: where those of its columns stand in specs_
    dlpack::Device device{};
    Py_ssize_t state_position = 0;  // where PyDict_Next finds the row's state
  };
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
    size_t first_row = 0, last_row = 0;
    std::vector<Entry> entries;   // the group's items when it was last read
    std::vector<int> structural;  // truth of the structural keys' values then
    bool constant = false;        // no value can change while its object stays
  };

  bool add_row(PyObject* object);
  PyObject* grad_of(const HostRow& host) const;
  static bool is_alive(const HostRow& host);
  enum class Read { ok, stale, error };
  Read refresh_group(PyObject* group, size_t index, PyObject** params);
  bool parse_group(PyObject* group, size_t index, bool* stale);
  bool read_limits(PyObject* limits, Group& group);
  bool refuse(PyObject* group, size_t index);
  bool is_on_device_of_rows(const Group& group, const TensorView& view) const;
  bool read_triton_rows(PyObject* devices);
  void make_phases();
  void collect();
  bool read_trust_ratio(PyObject* group, TrustRatio* out);
  bool number(PyObject* value, double* out);
  bool choice(PyObject* value, const HyperField& field, double* out);
  const char* refresh_row(HostRow& host, Row& row, PyObject* state);
  const char* read_states(HostRow& host, Row& row, PyObject* state);
  const char* read_state(const HostRow& host, Row& row, int column, bool per_tensor, PyObject* value);
  PyObject* find_state(HostRow& host, PyObject* state);
  void locate_states(PyObject* state);
  bool read_column(const HostRow& host, int column, PyObject* object, TensorView& view);
  bool same_layout(const HostRow& host, const TensorView& view) const;
  void find_overlaps();

  TensorReader reader_;
  const CpuKernels* kernels_ = nullptr;
  std::vector<HostRow> hosts_;
  std::vector<Row> rows_;
  std::vector<int64_t> layouts_;
  std::vector<PyObject*> specs_;  // of the DTensors that sharded rows have accepted: kColumns a row
  std::vector<Group> groups_;
  std::vector<GroupHyper> hypers_;
  std::vector<HyperTensors> hyper_tensors_;      // those that are read on the rows' device
  std::vector<std::unique_ptr<Phases>> phases_;  // the host's first, then the devices'
  CpuPhases* host_ = nullptr;
  std::vector<CudaPhases*> devices_;
  std::vector<std::vector<size_t>> triton_rows_;
  bool collected_ = false;      // the phases know what refresh() has found
  bool has_direction_ = false;  // of some rule
  PyObject* defaults_ = nullptr;
  PyObject* trust_ratio_ = nullptr;
  PyObject* check_ = nullptr;
  std::vector<PyObject*> structural_keys_;
  int64_t active_elements_ = 0;
  int64_t active_rows_ = 0;
  bool active_changed_ = true;
  bool written_moved_ = false;  // an address that the step writes has changed
  bool states_located_ = false;
};

// Interned names that never die: group and state keys are compared by identity first.
struct RuleNames {
  std::string name;
  std::vector<PyObject*> state_names;
  std::vector<bool> per_tensor;
  struct Hyper {
    PyObject* key;
    HyperField field;
  };
  std::vector<Hyper> hyper;
};
const std::vector<RuleNames>& rule_names();

}  // namespace fused_optim
