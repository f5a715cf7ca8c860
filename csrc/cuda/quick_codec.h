// codec.h without branches, for the elements of a vector: what a warp computes with where nothing is out of
// the ordinary. As quick_float.h has it: where nothing here says that it is not sure, the bits are codec.h's.
// tests/csrc/quick_codec_test.cpp compares the two.
#pragma once

#include <cstdint>

#include "codec.h"
#include "cuda/quick_float.h"

namespace fused_optim {

// Four bytes of eight, each by a digit of the selector from the right; from 8 on, its sign in all bits.
FO_HOST_DEVICE inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#else
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i & 15u;
    auto byte = static_cast<uint32_t>(bytes >> 8 * (digit & 7u)) & 255u;
    if (digit >= 8) byte = byte >= 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
#endif
}

// The bytes of one place of four words.
FO_HOST_DEVICE inline uint32_t gather(const uint32_t* words, uint32_t place) {
  const uint32_t selector = place | (4 + place) << 4;
  return permute(permute(words[0], words[1], selector), permute(words[2], words[3], selector), 0x5410);
}

FO_HOST_DEVICE inline uint32_t zero_bytes(uint32_t bytes) {  // 0 where there are none
  return (bytes - 0x01010101u) & ~bytes & 0x80808080u;
}

// 0x4b000000 + the whole part of a number from 0 to below 2^23.
FO_HOST_DEVICE inline uint32_t whole_part(float value) {
#if defined(__CUDA_ARCH__)
  return bits_of(__fadd_rz(value, 0x1p23f));
#else
  return 0x4b000000u + static_cast<uint32_t>(static_cast<int32_t>(value));
#endif
}

// The root of a magnitude in units of its group's power of two: at most 1. It is IEEE's from 2^-70 on;
// whoever has less has the code of 0, or the least one.
FO_HOST_DEVICE inline float root_of_share(float magnitude, float inverse) {
  const float share = fmaf(magnitude, inverse, 0x1p-100f);
  return root_of_normal(share, approximate_reciprocal_root(share));
}

// How the numbers of four elements are decoded and encoded. `scale` is the group's power of two and the
// code's unit, whose product is exact for every exponent that encoding makes.
struct QuickMeans {
  using Code = MeanCode;

  FO_HOST_DEVICE static uint32_t not_finite(uint32_t codes) { return zero_bytes(codes ^ 0x80808080u); }
  FO_HOST_DEVICE static float decode(uint32_t codes, int k, float scale) {
    const auto f = static_cast<float>(static_cast<int8_t>(codes >> 8 * k));
    return f * fabsf(f) * scale;
  }
  // What the largest of a group is sought of, and the magnitude of that.
  FO_HOST_DEVICE static float for_largest(QuickFloat value) { return fabsf(value.value); }
  FO_HOST_DEVICE static float magnitude_of(float largest) { return largest; }
  FO_HOST_DEVICE static uint32_t encode(const QuickFloat* values, float inverse, const uint32_t* words) {
    uint32_t sums[4];
    for (int k = 0; k < 4; ++k) {
      const float y =
          root_of_share(fabsf(values[k].value), inverse) * (static_cast<float>(Code::kLevels) * 65536.0f);
      sums[k] = whole_part(y) + ((words[k] & 0xff00u) | 0x80u);
    }
    const uint32_t codes = gather(sums, 2);
    const uint32_t bits[4] = {bits_of(values[0].value), bits_of(values[1].value), bits_of(values[2].value),
                              bits_of(values[3].value)};
    // (code ^ sign) - sign in each byte; no carry leaves it.
    const uint32_t signs = gather(bits, 8 + 3);
    const uint32_t turned = codes ^ signs;
    return ((turned & 0x7f7f7f7fu) + (signs & 0x01010101u)) ^ (turned & 0x80808080u);
  }
};

struct QuickRoots {
  using Code = RootCode;

  FO_HOST_DEVICE static uint32_t not_finite(uint32_t codes) { return zero_bytes(~codes); }
  FO_HOST_DEVICE static float decode(uint32_t codes, int k, float scale) {
    const auto f = static_cast<float>(codes >> 8 * k & 255u);
    const float root = f * f * scale;
    return root * root;
  }
  // The root keeps the order.
  FO_HOST_DEVICE static float for_largest(QuickFloat value) { return value.value; }
  FO_HOST_DEVICE static float magnitude_of(float largest) { return square_root(QuickFloat(largest)).value; }
  FO_HOST_DEVICE static uint32_t encode(const QuickFloat* values, float inverse, const uint32_t* words) {
    uint32_t sums[4];
    for (int k = 0; k < 4; ++k) {
      const float magnitude = square_root(values[k]).value;
      // Half of it: the lowest bit of y decides nothing, since the random bits end in a one and a zero.
      const float y = root_of_share(magnitude, inverse) * (static_cast<float>(Code::kLevels) * 32768.0f);
      const uint32_t random = (words[k] >> 16 & 0xfffcu) | (2u - 0x96000000u);
      const uint32_t sum = (whole_part(y) << 1) + random;  // less twice 0x4b000000
      const uint32_t magnitude_bits = bits_of(magnitude), least = Code::kFloor << 16;
      const uint32_t floor = magnitude_bits < least ? magnitude_bits : least;  // 0 of a zero
      sums[k] = sum > floor ? sum : floor;
    }
    return gather(sums, 2);
  }
};

// A group's exponent from its largest magnitude, and whether codes by it are sure to be codec.h's.
template <class Quick>
FO_HOST_DEVICE inline bool quick_exponent(float largest, int32_t& exponent) {
  const auto bits = static_cast<int32_t>(bits_of(largest));
  exponent = group_exponent<typename Quick::Code>(bits);
  return static_cast<uint32_t>(bits) <= static_cast<uint32_t>(Quick::Code::kMost) << 23;
}

// What codes of such a group are multiplied with.
template <class Quick>
FO_HOST_DEVICE inline bool quick_scale(int32_t exponent, float& scale) {
  scale = power_of_two(exponent) * Quick::Code::kUnit;
  return exponent == 0 || exponent >= Quick::Code::kLeast;
}

// Four masters of 24 bits: the parameters two in a word, the remainders in one. load_split8 and store_split8.
FO_HOST_DEVICE inline void load_split8(const uint32_t* params, uint32_t remainders, float* out) {
  // A remainder counts beside magnitudes from 1 to 0x7f7f: where one of these sums reaches 0x8000.
  uint32_t counts[2];
  for (int w = 0; w < 2; ++w) {
    const uint32_t magnitudes = params[w] & 0x7fff7fffu;
    counts[w] = (magnitudes + 0x7fff7fffu) ^ (magnitudes + 0x00800080u);
  }
  const uint32_t counted = remainders & permute(counts[0], counts[1], 0xfdb9);
  for (uint32_t k = 0; k < 4; ++k) {
    const uint32_t upper = k % 2 == 0 ? params[k / 2] << 16 : params[k / 2] & 0xffff0000u;
    const uint32_t lower = permute(counted, 0, 4 | k << 4 | (8 + k) << 8 | (8 + k) << 12);
    out[k] = float_of(upper + lower);
  }
}

FO_HOST_DEVICE inline void store_split8(const QuickFloat* values, const uint32_t* words, uint32_t* params,
                                        uint32_t& remainders) {
  uint32_t sums[4];
  for (int k = 0; k < 4; ++k) sums[k] = bits_of(values[k].value) + (words[k] & 255u) + 0x8000u;
  params[0] = permute(sums[0], sums[1], 0x7632);
  params[1] = permute(sums[2], sums[3], 0x7632);
  remainders = gather(sums, 1) ^ 0x80808080u;
}

// Two parameters of bfloat16, rounded up or down.
FO_HOST_DEVICE inline uint32_t pack_stochastically(const QuickFloat* values, const uint32_t* words) {
  const uint32_t low = bits_of(values[0].value) + (words[0] * 0x9e3779b1u >> 16);
  const uint32_t high = bits_of(values[1].value) + (words[1] * 0x9e3779b1u >> 16);
  return permute(low, high, 0x7632);
}

}  // namespace fused_optim
