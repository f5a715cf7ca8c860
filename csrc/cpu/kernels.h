// The element loops, compiled once for each instruction set. No standard container stands here: what the
// linker merges must not come from the build for a newer processor.
#pragma once

#include <cstdint>

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
using MoveFunction = void (*)(const Row& row, const ScalarsRecord& record, double step_size,
                              const void* directions);

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

}  // namespace fused_optim
