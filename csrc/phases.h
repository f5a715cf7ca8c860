// reduce, prepare and apply for some rows of a plan. CpuPhases steps those on the host, a CudaPhases those on
// one CUDA device; kernels/phases.py does the same for Triton.
#pragma once

#include <cstddef>
#include <vector>

#include "step.h"

namespace fused_optim {

// What a row measured at the last step; on a device the numbers are at DeviceStep::measured, and here they
// are 0.
struct RowNorms {
  size_t row;  // its index in the plan
  MeasuredNorms norms;
};

class Phases {
 public:
  virtual ~Phases() = default;

  // Takes over its rows as the plan has found them for this step, before either phase.
  virtual void collect(const std::vector<Row>& rows) = 0;

  // The norms that a clip, a rule or a trust ratio needs before the first pass, and whether all gradients are
  // finite, if step.options.finds_inf. Adds the sum of squares over rows that take part in clipping to *sum,
  // for which it waits, unless step.exchange adds it. False: the exchange has failed.
  virtual bool reduce(const Step& step, double* sum) = 0;

  // The step of its active rows; with the norms of reduce(), if that has been called since collect(). Where a
  // rule has a direction, step.exchange adds up the norms of directions. False: that has failed.
  //
  // Throws std::runtime_error if a device fails.
  virtual bool apply(const Step& step) = 0;

  // Adds the rows that the last apply() has stepped and of which it has measured any norm.
  virtual void add_norms(std::vector<RowNorms>* norms) const = 0;
};

}  // namespace fused_optim
