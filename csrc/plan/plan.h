// The plan: which memory one optimizer's step reads and writes, with which numbers.
//
// Python builds it once from the param groups. Each step calls refresh(), which reads again what a user may
// have changed: every address and layout, every hyperparameter; then run().
//
// plan.cpp builds and refreshes the table and takes a step through cpu/ and cuda/. tensor_reader reads where
// a tensor lies, by the structures of dlpack.h. triton_table.h is the table of rows that Triton's kernels
// step.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/phases.h"
#include "cuda/phases.h"
#include "plan/tensor_reader.h"
#include "row.h"

namespace fused_optim {

// What a step's numbers are on one CUDA device: addresses as in CudaStep.
struct DeviceScalars {
  int device;
  uint64_t grad_scale, found_inf, grad_norm, non_finite, measured, exchanged;
};

class Plan {
 public:
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() { clear(); }

  // All PyObject* results are new references; null means that a Python error is set.

  bool open(PyObject* exchange_api, PyObject* kind_of, PyObject* same_placement, PyObject* describe,
            PyObject* current_stream, PyObject* negative_bit, const CpuKernels* kernels);

  // rules: the rule's name of each group. launched: for each device whose kernels others launch, the indices
  // of its rows; they are read here, and neither reduced nor stepped. rows: (group index, param, lr scale,
  // weight decay scale, native, clipped, trusted, key of the master's state or None) of each parameter, in
  // the order of the groups. defaults: hyperparameters that a group may lack. structural: group keys for
  // which a change between true and false calls for a new plan. trust_ratio: called with a group whose items
  // have changed, returns None or the fields of its TrustRatio.
  bool build(PyObject* rules, PyObject* rows, PyObject* launched, PyObject* defaults, PyObject* structural,
             PyObject* trust_ratio);

  // Reads everything again and changes nothing. None: the groups no longer are those of the plan, build a new
  // one. Otherwise a sequence of (row index, reason): rows with a gradient that no native backend takes as
  // they are.
  PyObject* refresh(PyObject* param_groups, PyObject* state);

  // The norms that a clip or a rule needs, of all rows that refresh accepted. *sum: that of squares over
  // those that take part in clipping; waits for the devices that have some of them, if they exchange nothing.
  // exchange: None, or called before norms are used, to add up those of rows of which other processes have
  // parts: with a writable memoryview of Norms by row, 0 where nothing was measured, and it returns the sum
  // over rows that it has set to 0; with the index of each CUDA device where DeviceScalars::exchanged is one,
  // and it returns what that device adds to *sum. False with a Python error set.
  bool reduce(const StepOptions& options, int threads, const std::vector<DeviceScalars>& scalars,
              PyObject* exchange, double* sum);

  // Whether the last reduce(), with options.finds_inf, met a gradient element on the host that is not finite;
  // a CUDA device writes its answer where DeviceScalars says.
  bool non_finite() const { return non_finite_; }

  // What the kernels of a device whose rows are `launched` read, as refresh found it: see
  // plan/triton_table.h.
  void write_table(size_t device, int64_t* words) const;

  // The step of all rows that refresh accepted; global_norm: of all gradients, those that others step
  // included. Without it, rows on a CUDA device are clipped by the norm of that device's gradients, and
  // nothing waits. scalars: for each CUDA device what it reads and writes there. exchange: as for reduce, of
  // the norms of directions. Throws std::runtime_error; false with a Python error set.
  bool run(const StepOptions& options, int threads, std::optional<double> global_norm,
           const std::vector<DeviceScalars>& scalars, PyObject* exchange);

  // Whether torch's stream on a device of a row is being captured into a graph; valid after refresh.
  bool captured() const;

  // The norms of the last run: (row index, grad norm, param norm, trust ratio) of each row that it stepped
  // and of which it measured any. On a CUDA device the numbers are where DeviceScalars says, in the order of
  // its rows; here they are 0, and without such an address the row is not listed.
  PyObject* norms() const;

  // Lets go of the gradients that refresh() holds; the plan itself stays.
  void release();

  // The parameters that the last run() wrote, in a list that stays the plan's.
  PyObject* touched();

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct HostRow {
    PyObject* param = nullptr;
    PyObject* grad = nullptr;                    // held from refresh to the end of run
    PyTypeObject* type = nullptr;                // of the parameter; borrowed, compared only
    PyGetSetDescrObject* grad_getter = nullptr;  // torch's own, where the type has not replaced it; borrowed
    PyObject* master_key = nullptr;  // state key of the master weight, if the row has one; immortal
    bool native = false;
    bool launched = false;  // others step it
    bool sharded = false;   // its tensors are DTensors
    bool overlapping = false;
    int32_t ndim = 0;
    size_t layout = 0;  // where shape and strides stand in layouts_
    size_t specs = 0;   // of a sharded row: where those of its columns stand in specs_
    dlpack::Device device{};
    Py_ssize_t state_position = 0;  // where PyDict_Next finds the row's state
  };
  struct Entry {
    PyObject* key;
    PyObject* value;
  };
  struct Group {
    int rule = 0;
    size_t first_row = 0, last_row = 0;
    std::vector<Entry> entries;   // the group's items when it was last read
    std::vector<int> structural;  // truth of the structural keys' values then
    bool constant = false;        // no value can change while its object stays
  };

  bool row_from_tuple(PyObject* tuple);
  PyObject* grad_of(const HostRow& host) const;
  enum class Read { ok, stale, error };
  Read refresh_group(PyObject* group, size_t index, PyObject** params);
  // The rows that one CUDA device holds.
  struct Device {
    int index;
    std::vector<size_t> rows;
    std::vector<Row> table;  // those rows as they are at this step
    std::unique_ptr<CudaPhases> phases;
    void* stream = nullptr;  // torch's, as refresh() found it
    bool measures = false;   // the last run() has left its rows' norms on the device
  };

  bool parse_group(PyObject* group, size_t index, bool* stale);
  bool is_on_device_of_rows(const Group& group, const TensorView& view) const;
  bool find_launched(PyObject* launched);
  void find_devices();
  const std::vector<Row>& host_rows();
  bool collect(Device& device) const;
  CudaStep step_of(const Device& device, const StepOptions& options,
                   const std::vector<DeviceScalars>& scalars) const;
  bool read_trust_ratio(PyObject* group, TrustRatio* out);
  bool number(PyObject* value, double* out);
  bool choice(PyObject* value, const HyperField& field, double* out);
  const char* refresh_row(HostRow& host, Row& row, PyObject* state);
  const char* read_states(HostRow& host, Row& row, PyObject* state);
  const char* read_state(const HostRow& host, Row& row, int column, bool per_tensor, PyObject* value);
  PyObject* find_state(HostRow& host, PyObject* state);
  void locate_states(PyObject* state);
  bool read_column(const HostRow& host, int column, PyObject* object, TensorView& view);
  bool exchange_on_host(PyObject* exchange, double* sum);
  static bool exchange_on(int device, PyObject* exchange, double* sum);
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
  std::vector<HyperTensors> hyper_tensors_;    // those that are read on the rows' device
  std::vector<Device> devices_;                // the CUDA devices that rows are on
  std::vector<std::vector<size_t>> launched_;  // the rows of each device whose kernels others launch
  std::vector<Row> host_rows_;                 // rows_ without theirs, if there are any
  std::vector<Norms> norms_;
  std::vector<ScalarsRecord> records_;
  std::vector<MeasuredNorms> measured_;
  std::atomic<bool> non_finite_{false};
  bool reduced_ = false;  // norms_ are those of the gradients that refresh() found
  PyObject* defaults_ = nullptr;
  PyObject* trust_ratio_ = nullptr;
  std::vector<PyObject*> structural_keys_;
  PyObject* touched_ = nullptr;
  int64_t active_elements_ = 0;
  int64_t active_rows_ = 0;
  bool active_changed_ = true;
  bool written_moved_ = false;  // an address that the step writes has changed
  bool states_located_ = false;
  bool busy_ = false;
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
