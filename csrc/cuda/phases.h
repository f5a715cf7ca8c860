// reduce, prepare and apply on a CUDA stream. Nothing here needs a CUDA header, so any file may include it.
//
// phases.cu is the host side: tables, their refresh, the launches. The kernels are in reduce.cu, with
// prepare's, apply.cu and patch.cu. device.h is what lies on the device and which kernels read it; vector.h
// its vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "prepare.h"

namespace fused_optim {

// The hyperparameters of one group that are tensors on the rows' device, by their place in GroupHyper::rule.
// The device reads them at each step, so that a scheduler's change is seen without a copy, and by a replayed
// graph.
struct HyperTensors {
  uint64_t address[kMaxHyper];  // 0: the number in GroupHyper counts
  DType dtype[kMaxHyper];
};

// What a step needs to know beside its rows. Addresses are of float32 numbers on the rows' device, where
// nothing else is said; 0: there is none.
struct CudaStep {
  StepOptions options;
  double global_norm;      // of all gradients, where the caller knows it
  bool global_norm_known;  // otherwise that of these rows is computed on the device
  bool reduced;            // reduce() has seen these gradients already
  uint64_t grad_scale;     // read: the loss scale; takes the place of options.grad_scale
  uint64_t found_inf;      // read: where it is not 0, nothing changes, the step counts included
  uint64_t grad_norm;      // written: the gradients' global norm, if options.clip asks for norms
  uint64_t non_finite;     // written, if options.finds_inf: 1 if some gradient holds an infinity or a NaN, in
                           // which case nothing changes; otherwise 0
  uint64_t measured;       // written: [rows, 3], the MeasuredNorms of the rows that this step takes
  // [rows, 6] in float64: Norms and the count of parts that are not finite. Of rows of which other processes
  // have parts: reduce() writes those of this process, run() reads those of the whole.
  uint64_t exchanged;
};

// The rows of one plan that are on one device.
class CudaPhases {
 public:
  // `rows`: numels, rules and parameter dtypes count; they stay for good. Kernels and tables are loaded here.
  // Throws std::runtime_error if the device cannot be used.
  static std::unique_ptr<CudaPhases> create(int device, const std::vector<Row>& rows, size_t groups);

  virtual ~CudaPhases() = default;

  // The sum of squares over the gradients that take part in clipping; waits for the device. For a global norm
  // over several devices, or over rows that others step. With an exchange it waits for nothing and returns 0.
  virtual double reduce(const std::vector<Row>& rows, const std::vector<GroupHyper>& groups,
                        const std::vector<HyperTensors>& tensors, const CudaStep& step, void* stream) = 0;

  // Sends what has changed since the last step, and the step itself, to `stream`; waits for nothing. `rows`
  // are those of create, in the same order. Where `stream` is being captured, the replays read a table of
  // their own, which lives as long as this object. exchange: called when the norms of directions are on their
  // way to step.exchanged; false gives the step up.
  //
  // Throws std::runtime_error with the phase and CUDA's name for the error.
  virtual void run(const std::vector<Row>& rows, const std::vector<GroupHyper>& groups,
                   const std::vector<HyperTensors>& tensors, const CudaStep& step, void* stream,
                   const std::function<bool()>& exchange) = 0;
};

// Why this device's rows cannot be stepped by the kernels that were built: no driver, or no code for its
// architecture. Empty if they can.
std::string why_no_cuda(int device);

// Whether work on a device's stream is being captured into a graph instead of done.
bool is_capturing(int device, void* stream);

// How many kernels this process has launched through here: what the bound on launches is tested by.
uint64_t cuda_launches();

}  // namespace fused_optim
