// reduce, prepare and apply on a CUDA stream. Nothing here needs a CUDA header, so any file may include it.
//
// phases.cu is the host side, which launches the kernels of reduce.cu, prepare.cu, apply.cu and patch.cu;
// table is how what it knows comes to the device, layout where that lies there, driver what it asks of CUDA.
// device.h has what the kernels are given, sums.h what two of them share, vector.h vectors in a device's
// memory, columns.h columns of a row, storages.h the combinations of storages that have code of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../phases.h"

namespace fused_optim {

// What a step's kernels know beside their rows.
struct CudaStep : DeviceStep {
  StepOptions options;
  double global_norm;      // of all gradients, where the caller knows it
  bool global_norm_known;  // otherwise that of these rows is computed on the device
  bool reduced;            // reduce() has seen these gradients already
};

// The rows of one plan that are on one device.
class CudaPhases : public Phases {
 public:
  // own: the indices of its rows among `rows`, whose numels, rules and parameter dtypes count; they stay for
  // good. groups, tensors: of the plan, as they are at each step. make_room: gives memory of the device back
  // that is held and not used. Kernels and tables are loaded here. Throws std::runtime_error if the device
  // cannot be used.
  static std::unique_ptr<CudaPhases> create(int device, const std::vector<Row>& rows, std::vector<size_t> own,
                                            const std::vector<GroupHyper>& groups,
                                            const std::vector<HyperTensors>& tensors,
                                            std::function<void()> make_room);

  virtual int device() const = 0;

  // The stream of the steps that follow.
  virtual void work_on(void* stream) = 0;

  // Whether work on that stream is being captured into a graph instead of done. The replays of a captured
  // apply() read a table of their own, which lives as long as the graph.
  virtual bool captured() const = 0;
};

// Why this device's rows cannot be stepped by the kernels that were built: no driver, or no code for its
// architecture. Empty if they can.
std::string why_no_cuda(int device);

// How many kernels this process has launched through here: what the bound on launches is tested by.
uint64_t cuda_launches();

}  // namespace fused_optim
