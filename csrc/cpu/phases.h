// reduce, prepare and apply on CPU threads.
//
// phases.cpp is the driver: which kernels, how many threads, who does which elements. kernels.cpp has the
// element loops; it is compiled once for each instruction set.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "prepare.h"

namespace fused_optim {

// The element update of one rule over elements [begin, end) of a row. only_states: param and grad are in the
// cache, only the states come from memory.
using ApplyFunction = void (*)(const Row& row, const ScalarsRecord& record, int64_t begin, int64_t end,
                               bool only_states);

// The first pass of a rule with a direction over elements [begin, end) of a row: its states, and the sums of
// param and direction. directions: room for the direction of every element in the compute type, or null.
using AccumulateFunction = Norms (*)(const Row& row, const ScalarsRecord& record, int64_t begin, int64_t end,
                                     void* directions);

// The second pass over a whole row whose directions the first has kept.
using MoveFunction = void (*)(const Row& row, double step_size, const void* directions);

// The sums over elements [begin, end) of a row that `needs` names. non_finite: set where it asks for that and
// an element of the gradient is infinite or NaN.
using ReduceFunction = Norms (*)(const Row& row, const GradTransform<double>& grad, unsigned needs,
                                 int64_t begin, int64_t end, bool& non_finite);

// The kernels as compiled for one instruction set, indexed by rule; all give the same bits.
struct CpuKernels {
  const char* capability;
  ApplyFunction apply_float[Rules::kCount];
  ApplyFunction apply_double[Rules::kCount];
  AccumulateFunction accumulate_float[Rules::kCount];  // null for a rule without a direction
  AccumulateFunction accumulate_double[Rules::kCount];
  MoveFunction move_float;
  MoveFunction move_double;
  ReduceFunction reduce_float;
  ReduceFunction reduce_double;
};

extern const CpuKernels cpu_kernels_default;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
#endif

// The best kernels that this processor runs, or those that `requested` names. Null if that names none that
// this processor runs.
const CpuKernels* choose_cpu_kernels(const char* requested);

// Whether an OpenMP runtime was found in the process; otherwise std::thread serves.
bool has_openmp();

// Which norms a rule with these hyperparameters reads.
unsigned needs_of_rule(int rule, const GroupHyper& group);

// One step's rows and numbers, and where its intermediate results go, row by row.
struct CpuStep {
  const CpuKernels& kernels;
  const std::vector<Row>& rows;
  const std::vector<GroupHyper>& groups;
  const StepOptions& options;
  int threads;
  std::vector<Norms>& norms;
  std::vector<ScalarsRecord>& records;
  std::vector<MeasuredNorms>& measured;
  std::atomic<bool>* non_finite = nullptr;  // set where options.finds_inf and reduce_cpu has found one
};

// The norms that rules, trust ratios and clipping need, of every active row, in fixed chunks added in a fixed
// order: the same bits for any number of threads.
void reduce_cpu(const CpuStep& step);

// The sum over all active, clipped rows; the split into groups does not change it.
double sum_of_squares(const std::vector<Row>& rows, const std::vector<Norms>& norms);

// The step of every active row. reduced: reduce_cpu has run. A row that is small enough for one thread's
// cache is reduced, prepared and applied back to back, unless there is an exchange: that is called when the
// norms of all directions stand in step.norms, whether or not there are any; false gives the step up.
void step_cpu(const CpuStep& step, bool reduced, double global_norm,
              const std::function<bool()>& exchange = {});

}  // namespace fused_optim
