// What lies in a device's memory beside the tensors, and where in one allocation: plain data and plain C++.
//
// Work is cut into pieces of a fixed size, whatever the GPU, so that sums have the same bits on every one:
//
// tile: 1,024 elements of a row, what one warp updates. Small tensors are packed eight to a block this way.
//
// chunk: 32,768 elements of a row, what one block sums. A row of up to 4,096 elements is summed by one warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "prepare.h"
#include "row.h"

namespace fused_optim {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarp * kWarpsPerBlock;
constexpr int kTile = 1024;
constexpr int kChunk = 32 * 1024;
constexpr int kSummedByWarp = 4 * 1024;
// Rows that a block prepares: few, so that the double-precision scalars spread over more multiprocessors. All
// of its threads sum the global norm.
constexpr int kPreparedRows = 64;

struct CudaGroup {
  GroupHyper hyper;
  HyperTensors tensors;
};

// A row's tiles in the numbering of a bucket; `row` is -1 behind the last.
struct Extent {
  int64_t first_tile;
  int64_t row;
};

// A piece of a row that a block sums. `out` counts from the totals: rows of one piece write their total
// itself.
struct Piece {
  int64_t begin;
  int32_t row;
  int32_t out;
};

// The pieces of one row, which lie side by side.
struct Pieces {
  int32_t row;
  int32_t first;
  int32_t count;
};

struct Sums {
  Norms norms;
  double non_finite;  // 1 if an element of the gradient is infinite or NaN
};

// Of one tile, after the first pass of a rule with a direction.
struct TileSums {
  double direction_sq;
  double param_sq;
};

// A row with a direction, and where the sums of its tiles begin.
struct DirectionRow {
  int64_t first;
  int64_t count;
  int64_t row;
};

struct Control {
  double grad_sq;  // over the rows that take part in clipping
  int32_t skip;    // found_inf says so, or an element that is not finite
};

// The launches of apply for the rows of one rule and one compute type.
struct BucketLayout {
  int rule;
  bool in_double;
  int64_t blocks;
  size_t extents, first_extent;
  int64_t first_tile_sums;  // of its tiles among those of all buckets; -1: the rule has no direction
};

// Where everything lies in a table, in bytes from its start: first what changes from step to step, then what
// never does, then what only kernels touch.
struct TableLayout {
  size_t row_count = 0, group_count = 0;
  size_t rows = 0, groups = 0;
  size_t changing_bytes = 0;
  size_t pieces = 0, totals = 0, small = 0, directions = 0;
  size_t sums = 0, sums_bytes = 0, records = 0, control = 0, tile_sums = 0;
  size_t bytes = 0;
  int32_t piece_count = 0, small_count = 0, total_count = 0;
  int64_t direction_count = 0;
  std::vector<BucketLayout> buckets;
  std::vector<uint32_t> words;  // what the host writes: here, what never changes
};

// Of rows, numels, rules and parameter dtypes count.
TableLayout lay_out(const std::vector<Row>& rows, size_t group_count);

}  // namespace fused_optim
