// What a step needs to know beside its rows; fused_optim/plan/step.py has the same names.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "prepare.h"

namespace fused_optim {

// A step's numbers on one device: addresses of float32 numbers there, where nothing else is said; 0: there is
// none.
struct DeviceStep {
  int32_t device;       // its index
  uint64_t grad_scale;  // read: the loss scale; takes the place of StepOptions::grad_scale
  uint64_t found_inf;   // read: where it is not 0, nothing changes, the step counts included
  uint64_t grad_norm;   // written: the gradients' global norm, if the clip asks for norms
  uint64_t non_finite;  // written, if StepOptions::finds_inf: 1 if some gradient holds an infinity or a NaN,
                        // in which case nothing changes; otherwise 0
  uint64_t measured;    // written: [rows, 3], the MeasuredNorms of the rows that this step takes
  // [rows, 6] in float64: Norms and the count of parts that are not finite. Of rows of which other processes
  // have parts: the phases write those of this process, and read those of the whole.
  uint64_t exchanged;
};

// Called before norms are used, to add up those of rows of which other processes have parts. norms: of all
// rows of the plan, on the host; null: those of a device's rows, at DeviceStep::exchanged. *sum: over the
// squares of rows that it has set to 0, or what the device adds to the sum of `reduce`. False: it has failed,
// and the step is given up.
using Exchange = std::function<bool(std::vector<Norms>* norms, int device, double* sum)>;

struct Step {
  StepOptions options;
  int threads;
  std::vector<DeviceStep> devices;
  Exchange exchange;                  // empty: there is none
  std::optional<double> global_norm;  // of all gradients; without it each device takes that of its own rows

  // Those of one device; all 0 where the step has none.
  DeviceStep of_device(int device) const {
    for (const DeviceStep& candidate : devices) {
      if (candidate.device == device) return candidate;
    }
    return {device, 0, 0, 0, 0, 0, 0};
  }
};

}  // namespace fused_optim
