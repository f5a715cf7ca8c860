// reduce, prepare and apply on CPU threads.
//
// phases.cpp is the driver: which kernels, how many threads, who does which elements. threads.cpp starts
// them. kernels.cpp has the element loops; it is compiled once for each instruction set.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

#include "../phases.h"
#include "cpu/kernels.h"

namespace fused_optim {

// Which norms a rule with these hyperparameters reads.
unsigned needs_of_rule(int rule, const GroupHyper& group);

// The rows of a plan that are on the host. Its norms, and so those of an exchange, stand by the plan's rows.
class CpuPhases final : public Phases {
 public:
  // groups: of the plan, as they are at each step. own: the indices of its rows among all `row_count`.
  CpuPhases(const CpuKernels& kernels, const std::vector<GroupHyper>& groups, size_t row_count,
            std::vector<size_t> own);

  void collect(const std::vector<Row>& rows) override;

  // Norms in fixed chunks added in a fixed order: the same bits for any number of threads, and for any split
  // into groups.
  bool reduce(const Step& step, double* sum) override;

  // A row that is small enough for one thread's cache is reduced, prepared and applied back to back, unless
  // there is an exchange: that is called when the norms of all directions are there.
  bool apply(const Step& step) override;

  void add_norms(std::vector<RowNorms>* norms) const override;

  // Whether the last reduce() has met a gradient element that is not finite.
  bool non_finite() const { return non_finite_; }

 private:
  const CpuKernels& kernels_;
  const std::vector<GroupHyper>& groups_;
  const std::vector<size_t> own_;
  std::vector<Row> own_rows_;  // its rows among inactive ones, if there are other phases
  const std::vector<Row>* rows_ = nullptr;
  std::vector<Norms> norms_;
  std::vector<ScalarsRecord> records_;
  std::vector<MeasuredNorms> measured_;
  std::atomic<bool> non_finite_{false};
  bool active_ = false;   // a row of its own is
  bool reduced_ = false;  // norms_ are those of the gradients of this step
};

}  // namespace fused_optim
