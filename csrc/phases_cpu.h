// reduce, prepare and apply on CPU threads.
#pragma once

#include <cstdint>
#include <vector>

#include "prepare.h"

namespace fused_optim {

// The element update of one rule over elements [begin, end) of a row.
using ApplyFunction = void (*)(const Row& row, const ScalarsRecord& record, int64_t begin, int64_t end);

// The sums over elements [begin, end) of a row that `needs` names.
using ReduceFunction = Norms (*)(const Row& row, const GradTransform<double>& grad, unsigned needs,
                                 int64_t begin, int64_t end);

// The kernels as compiled for one instruction set, indexed by rule; all give the same bits.
struct CpuKernels {
  const char* capability;
  ApplyFunction apply_float[Rules::kCount];
  ApplyFunction apply_double[Rules::kCount];
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

// Which norms the rule with this index reads.
unsigned needs_of_rule(int rule);

// The sums of every active row, in fixed chunks added in a fixed order: the same bits for any number of
// threads.
void reduce_cpu(const CpuKernels& kernels, const std::vector<Row>& rows,
                const std::vector<GroupHyper>& groups, const StepOptions& options, int threads,
                std::vector<Norms>& out);

// The sum over all active, clipped rows; the split into groups does not change it.
double sum_of_squares(const std::vector<Row>& rows, const std::vector<Norms>& norms);

// Per-tensor scalars of every active row: advances `step`, computes bias corrections and clip coefficients.
void prepare_cpu(const std::vector<Row>& rows, const std::vector<GroupHyper>& groups,
                 const StepOptions& options, const std::vector<Norms>& norms, double global_norm,
                 std::vector<ScalarsRecord>& out);

// The element update of every active row.
void apply_cpu(const CpuKernels& kernels, const std::vector<Row>& rows,
               const std::vector<ScalarsRecord>& records, int threads);

}  // namespace fused_optim
