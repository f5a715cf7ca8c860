// reduce, prepare and apply on CPU threads.
#pragma once

#include <cstdint>

#include "row.h"
#include "rules/all.h"

namespace fused_optim {

struct alignas(64) ScalarsRecord {
  unsigned char bytes[kScalarsBytes];
};

struct GroupHyper {
  double value[kMaxHyper];
};

// The element update of one rule over elements [begin, end) of a row.
using ApplyFunction = void (*)(const Row& row, const ScalarsRecord& scalars, int64_t begin, int64_t end);

// The kernels as compiled for one instruction set, indexed by rule; all give the same bits.
struct CpuKernels {
  const char* capability;
  ApplyFunction apply_float[Rules::kCount];
  ApplyFunction apply_double[Rules::kCount];
};

extern const CpuKernels cpu_kernels_default;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
#endif

// The best kernels that this processor runs, or those that FUSED_OPTIM_CPU_CAPABILITY names. Null if that
// names none that this processor runs.
const CpuKernels* choose_cpu_kernels(const char* requested);

// Whether the caller's OpenMP runtime was found in the process; otherwise std::thread serves.
bool has_openmp();

// Per-tensor scalars of every active row: advances `step`, computes bias corrections.
void prepare_cpu(const Row* rows, int64_t count, const GroupHyper* groups, double grad_scale, ScalarsRecord* out);

// The element update of every active row, on at most `threads` threads.
void apply_cpu(const CpuKernels& kernels, const Row* rows, int64_t count, const ScalarsRecord* scalars, int threads);

}  // namespace fused_optim
