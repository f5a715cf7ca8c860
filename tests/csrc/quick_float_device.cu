// On a device: the root of every float there is, and 2^32 quotients, with the first approximations that the
// processor really gives. Prints how many are wrong, and how many were left open.
#include <cstdio>

#include "cuda/quick_float.h"

using namespace fused_optim;

namespace {

struct Counts {
  unsigned long long wrong, open;
};

__device__ bool is_nan(float value) { return value != value; }

__device__ void judge(float got, float expected, bool promised, Counts* counts) {
  if (is_nan(got)) {
    if (promised) atomicAdd(&counts->open, 1ull);
  } else if (bits_of(got) != bits_of(expected)) {
    atomicAdd(&counts->wrong, 1ull);
  }
}

__device__ uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

__global__ void try_all(Counts* counts) {
  const uint64_t first = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x;
  for (uint64_t i = first; i < uint64_t{1} << 32; i += uint64_t{gridDim.x} * blockDim.x) {
    const float value = float_of(static_cast<uint32_t>(i));
    judge(square_root(QuickFloat(value)).value, sqrtf(value), value >= 0 && value < 0x1p64f, counts);
    const float divisor = float_of(0x22000000u + mixed(static_cast<uint32_t>(i)) % 0x29800000u);
    const bool promised =
        fabsf(value) >= 0x1p-100f && fabsf(value) < 0x1p60f && (bits_of(divisor) & 0x7ffff8u) != 0x7ffff8u;
    judge((QuickFloat(value) / QuickFloat(divisor)).value, value / divisor, promised, counts + 1);
  }
}

}  // namespace

int main() {
  Counts* counts = nullptr;
  if (cudaMallocManaged(&counts, 2 * sizeof *counts) != cudaSuccess) return 2;
  counts[0] = counts[1] = {0, 0};
  try_all<<<2048, 256>>>(counts);
  if (cudaDeviceSynchronize() != cudaSuccess) return 2;
  std::printf("roots: %llu wrong, %llu open; quotients: %llu wrong, %llu open\n", counts[0].wrong,
              counts[0].open, counts[1].wrong, counts[1].open);
  return counts[0].wrong + counts[0].open + counts[1].wrong + counts[1].open != 0;
}
