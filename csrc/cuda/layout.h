// What lies in a device's memory beside the tensors, and where in one allocation: plain data and plain C++.
//
// Work is cut into pieces of a fixed size, whatever the GPU, so that sums have the same bits on every one:
//
// tile: 1,024 elements of a row, what one warp updates. Small tensors are packed eight to a block this way.
//
// chunk: 32,768 elements of a row, what a block sums in float before it goes on in double. A block sums one
// chunk, or as many as leave no more than 4,096 pieces of a row, which one block then adds. A row of up to
// 4,096 elements is summed by one warp. With three blocks a multiprocessor, ResNet-50's 801 pieces are two
// waves of an H100's 396; a shorter chunk would leave a block more of its life without a load under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/tuning.h"
#include "prepare.h"
#include "row.h"

namespace fused_optim {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarp * kWarpsPerBlock;
constexpr int kTile = FO_TILE;
constexpr int kChunk = 32 * 1024;
constexpr int kSummedByWarp = 4 * 1024;
constexpr int kMostPieces = FO_MOST_PIECES;
// Rows that a block prepares: few, so that the double-precision scalars spread over more multiprocessors. All
// of its threads sum the global norm.
constexpr int kPreparedRows = 64;

struct CudaGroup {
  GroupHyper hyper;
  HyperTensors tensors;
};

// A row's tiles in the numbering of a bucket; `row` is -1 behind the last.
struct alignas(16) Extent {
  int64_t first_tile;
  int32_t row;
  int32_t first_sum;  // of its blocks' direction sums; where the rule has a direction
};

// A piece of a row that a block sums, or a row that a warp does. `out` counts from the totals: rows of one
// piece write their total itself. The group is the row's, which would have to be read first.
struct alignas(8) Piece {
  int64_t begin;
  int32_t count;
  int32_t row;
  int32_t group;
  int32_t out;
};

// The pieces of one row, which lie side by side.
struct Pieces {
  int32_t row;
  int32_t first;
  int32_t count;
};

struct alignas(16) Sums {
  Norms norms;
  double non_finite;  // 1 if an element of the gradient is infinite or NaN
};

// Of the tiles of one row in one block, after the first pass of a rule with a direction.
struct alignas(16) DirectionSums {
  double direction_sq;
  double param_sq;
};

// A row with a direction, and where the sums of its blocks lie side by side.
struct DirectionRow {
  int32_t row;
  int32_t first;
  int32_t count;
};

struct Control {
  double grad_sq;  // over the rows that take part in clipping
  int32_t skip;    // found_inf says so, or an element that is not finite
};

// Which of the kernels of apply.
struct Kernel {
  int rule;
  bool in_double;
  bool draws;  // some rows draw random words
};

// The launches of apply for the rows of one bucket.
struct BucketLayout {
  Kernel kernel;
  int64_t blocks;
  size_t extents, first_extent;
  bool has_direction;
};

// Where everything lies in a table, in bytes from its start: first what changes from step to step, then what
// never does, then what only kernels touch.
struct TableLayout {
  size_t row_count = 0, group_count = 0;
  size_t rows = 0, groups = 0;
  bool keeps_directions = false;  // of some rows: Step.exchange changes them between the passes
  size_t changing_bytes = 0;
  size_t pieces = 0, totals = 0, directions = 0;
  size_t sums = 0, sums_bytes = 0, records = 0, control = 0, direction_sums = 0;
  size_t bytes = 0;
  int32_t piece_count = 0, small_count = 0, total_count = 0, direction_count = 0;
  std::vector<BucketLayout> buckets;
  std::vector<uint32_t> words;  // what the host writes: here, what never changes
};

// Of rows, numels, groups, rules, parameter dtypes and whether they draw random words count.
TableLayout lay_out(const std::vector<Row>& rows, size_t group_count);

}  // namespace fused_optim
