// The kernels, and what they are given. What they find on the device is in layout.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/layout.h"
#include "cuda/phases.h"

namespace fused_optim {

// The rows of one rule and one compute type: one launch of apply. Where a rule measures its direction, those
// that draw random words are one more.
struct Bucket {
  const Extent* extents;        // in order, followed by kWarpsPerBlock of row -1
  const int32_t* first_extent;  // of each block
  const Row* rows;
  const ScalarsRecord* records;
  const Control* control;
  DirectionSums* direction_sums;  // where the rule has a direction
  int32_t first_state;            // the first column with a number an element
  bool backwards;  // the last tiles first: after reduce those are what is still in the second-level cache
};

struct ReduceTable {
  const Row* rows;
  const CudaGroup* groups;
  const Piece* pieces;  // of blocks, then those that a warp sums
  int32_t piece_count;
  int32_t small_count;
  Sums* sums;  // a total of each row, then the pieces
};

struct PrepareTable {
  const Row* rows;
  const CudaGroup* groups;
  Sums* sums;
  ScalarsRecord* records;
  Control* control;
  int32_t row_count;
};

// Changed words of a table, as kernel parameters: no pinned buffer, no event, nothing to reuse too early.
template <int kWords>
struct PatchWords {
  uint32_t* table;
  int32_t count;
  uint32_t offset[kWords];
  uint32_t value[kWords];
};

constexpr int kPatchWordsSmall = 498;  // 4,000 bytes of parameters
// 32,764 bytes: toolkits and drivers of CUDA 12.1 and later.
constexpr int kPatchWords = CUDART_VERSION >= 12010 ? 4090 : kPatchWordsSmall;

template <int kWords>
__global__ void patch_kernel(const __grid_constant__ PatchWords<kWords> words) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < words.count) words.table[words.offset[i]] = words.value[i];
}

using LargePatchKernel = void (*)(PatchWords<kPatchWords> words);
LargePatchKernel large_patch_kernel();

__global__ void reduce_kernel(ReduceTable table, CudaStep step);
__global__ void total_kernel(const Pieces* pieces, const Row* rows, Sums* sums);
__global__ void grad_sq_kernel(PrepareTable table, uint64_t non_finite_address);
__global__ void prepare_kernel(PrepareTable table, CudaStep step);

// Whether the sums of its blocks are the whole row's. If other processes have parts of it, they are added up
// to its Sums in one launch, and read from there in another.
enum class DirectionPass : int32_t { whole, add_up, prepare };
__global__ void direction_kernel(const DirectionRow* rows, const DirectionSums* sums, PrepareTable table,
                                 CudaStep step, DirectionPass pass);

using ApplyKernel = void (*)(Bucket bucket);
ApplyKernel apply_kernel_of(const Kernel& kernel);
ApplyKernel accumulate_kernel_of(const Kernel& kernel);  // null for a rule without a direction

}  // namespace fused_optim
