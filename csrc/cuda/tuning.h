// Numbers that decide how fast the kernels are, and not what they compute. A build may choose others by -D;
// scripts/gpu_day.sh measures them.
#pragma once

// Blocks that a multiprocessor runs at once of an element update with few columns, on sm_90 and later: three
// leave 80 registers a thread.
#if !defined(FO_BLOCKS)
#define FO_BLOCKS 3
#endif

// Kilobytes that the loads of a multiprocessor ask for before they are waited for: an H200's memory is busy
// with 48, an H100's with 32.
#if !defined(FO_KB_IN_FLIGHT)
#define FO_KB_IN_FLIGHT 48
#endif

// Elements of a tile, which a warp updates.
#if !defined(FO_TILE)
#define FO_TILE 1024
#endif

// 1: what a step reads and writes exactly once is the first to leave the cache. 0: as everything else.
#if !defined(FO_STREAMING)
#define FO_STREAMING 1
#endif

// Pieces of a row that one block adds, at most. The tests of the kernels on a host take few, so that a row
// need not be huge to have pieces of several chunks.
#if !defined(FO_MOST_PIECES)
#define FO_MOST_PIECES 4096
#endif
