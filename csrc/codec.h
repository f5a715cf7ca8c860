// Numbers of a byte, and rounding by random words: the twin of fused_optim/state/codec.py, bit for bit.
//
// A state's groups of kGroup consecutive elements have a scale each, the exponent of a power of two, biased
// by 127. Averages of gradients are int8, by the root of their magnitude; averages of squares uint8, by their
// fourth root. Only products, IEEE's roots and integer operations take part. A caller finds the largest
// `magnitude_bits` of a group, in whatever order, and from that the group's exponent; everything else is
// element by element.
#pragma once

#include <cstdint>

#include "storage.h"

namespace fused_optim {

constexpr int kGroup = 32;

inline namespace FO_INSTRUCTION_SET {

FO_HOST_DEVICE inline uint32_t mix(uint32_t word) {
  word = (word ^ (word >> 16)) * 0x7feb352du;
  word = (word ^ (word >> 15)) * 0x846ca68bu;
  return word ^ (word >> 16);
}

// What the random words of one parameter at one step are made from. step: 1 at the first; place: of the
// parameter among all of the optimizer.
FO_HOST_DEVICE inline uint32_t random_key(uint32_t seed, uint32_t step, uint32_t place) {
  return mix(mix(mix(seed + 0x9e3779b9u) ^ step) ^ (place + 0x85ebca6bu));
}

// The word of an element by its place in the whole tensor. upper_key: of all places with the same upper half.
FO_HOST_DEVICE inline uint32_t upper_key(uint32_t key, int64_t place) {
  return key ^ mix(static_cast<uint32_t>(static_cast<uint64_t>(place) >> 32));
}
constexpr uint32_t kPlaceStride = 0x9e3779b9u;
FO_HOST_DEVICE inline uint32_t random_word(uint32_t upper_key, uint32_t lower_place) {
  return mix(lower_place * kPlaceStride + upper_key);
}

// The two codes. Bits: the 16 random bits that are added below the code.
struct MeanCode {
  using Storage = int8_t;
  static constexpr int32_t kLevels = 127, kFloor = 0, kLeast = -112 + 127, kMost = 126 + 127;
  static constexpr int32_t kNotFinite = -128;
  static constexpr float kUnit = 1.0f / (127.0f * 127.0f);

  FO_HOST_DEVICE static int32_t random(uint32_t word) {
    return static_cast<int32_t>((word & 0xff00u) | 0x80u);
  }
  FO_HOST_DEVICE static float magnitude(float value) { return float_of(bits_of(value) & 0x7fffffffu); }
  FO_HOST_DEVICE static int32_t with_sign(int32_t code, float value) {
    const int32_t sign = static_cast<int32_t>(bits_of(value)) >> 31;
    return (code ^ sign) - sign;
  }
};

struct RootCode {
  using Storage = uint8_t;
  static constexpr int32_t kLevels = 254, kFloor = 4, kLeast = -51 + 127, kMost = 63 + 127;
  static constexpr int32_t kNotFinite = 255;
  static constexpr float kUnit = 1.0f / (254.0f * 254.0f);

  FO_HOST_DEVICE static int32_t random(uint32_t word) {
    return static_cast<int32_t>(((word >> 16) & 0xfffcu) + 2u);
  }
  FO_HOST_DEVICE static float magnitude(float value) { return square_root(value); }
  FO_HOST_DEVICE static int32_t with_sign(int32_t code, float) { return code; }
};

// 2 to a biased exponent; 0 for 0.
FO_HOST_DEVICE inline float power_of_two(int32_t exponent) {
  return float_of(static_cast<uint32_t>(exponent) << 23);
}

// The bits of a magnitude without its sign, for the largest of a group; what is not finite is kNotFinite or
// more. A magnitude is not negative, but for a -0.
constexpr int32_t kNotFiniteBits = 0x7f800000;

FO_HOST_DEVICE inline int32_t magnitude_bits(float magnitude) {
  return static_cast<int32_t>(bits_of(magnitude) & 0x7fffffffu);
}

FO_HOST_DEVICE inline int32_t finite_bits(float magnitude) {
  const int32_t bits = magnitude_bits(magnitude);
  return bits < kNotFiniteBits ? bits : 0;
}

// A group's exponent from the largest finite_bits of its magnitudes.
template <class Code>
FO_HOST_DEVICE inline int32_t group_exponent(int32_t most) {
  const int32_t found = (most + 0x7fffff) >> 23;
  const int32_t exponent = found < Code::kLeast ? Code::kLeast : found > Code::kMost ? Code::kMost : found;
  return most > 0 ? exponent : 0;
}

// The code of a value whose magnitude is finite, from the root of that in units of the group's power of two.
template <class Code>
FO_HOST_DEVICE inline int32_t encode_root(float value, float magnitude, float root, uint32_t word) {
  // In units of 2^-16 codes; the factor 65536 changes no rounding.
  const float y = root * (static_cast<float>(Code::kLevels) * 65536.0f);
  int32_t code = (static_cast<int32_t>(y) + Code::random(word)) >> 16;
  code = code > Code::kLevels ? Code::kLevels : code;
  const int32_t least = magnitude > 0 ? Code::kFloor : 0;
  code = code < least ? least : code;
  return Code::with_sign(code, value);
}

// inverse: power_of_two(254 - the group's exponent).
template <class Code>
FO_HOST_DEVICE inline int32_t encode_finite(float value, float magnitude, float inverse, uint32_t word) {
  return encode_root<Code>(value, magnitude, square_root(magnitude * inverse), word);
}

template <class Code>
FO_HOST_DEVICE inline int32_t encode(float value, float magnitude, float inverse, uint32_t word) {
  if (magnitude_bits(magnitude) >= kNotFiniteBits) return Code::kNotFinite;
  return encode_finite<Code>(value, magnitude, inverse, word);
}

// Sums make the masks of codes that are not finite: of a comparison GCC 12 makes a branch, and does not
// vectorise.
FO_HOST_DEVICE inline float decode(int8_t code, float power) {
  const auto f = static_cast<float>(code);
  const float value = (f * MeanCode::magnitude(f) * MeanCode::kUnit) * power;
  const auto nan = static_cast<uint32_t>((code + 127) >> 31);
  return float_of(bits_of(value) | (nan & 0x7fc00000u));
}

FO_HOST_DEVICE inline float decode(uint8_t code, float power) {
  const auto f = static_cast<float>(code);
  const float root = (f * f * RootCode::kUnit) * power;
  const auto infinite = static_cast<uint32_t>(-((code + 1) >> 8));
  return float_of((bits_of(root * root) & ~infinite) | (infinite & 0x7f800000u));
}

// The same of codes that have been widened, for a loop of floats alone. scaled: the power times kUnit, a
// product that is exact for every exponent that a group may have.
FO_HOST_DEVICE inline float decode_mean(float f, float scaled) {
  const float value = f * MeanCode::magnitude(f) * scaled;
  const auto nan = static_cast<uint32_t>(static_cast<int32_t>(bits_of(f + 127.0f)) >> 31);
  return float_of(bits_of(value) | (nan & 0x7fc00000u));
}
FO_HOST_DEVICE inline float decode_root(float f, float scaled) {
  const float root = f * f * scaled;
  const auto infinite = static_cast<uint32_t>(static_cast<int32_t>(bits_of(254.5f - f)) >> 31);
  return float_of((bits_of(root * root) & ~infinite) | (infinite & 0x7f800000u));
}

// Up or down, so that the mean over all random words is the value.
FO_HOST_DEVICE inline void store_stochastically(bfloat16& out, float value, uint32_t word) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + ((word * 0x9e3779b1u) >> 16)) >> 16;
  out.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

FO_HOST_DEVICE inline void store_stochastically(float16& out, float value, uint32_t word) {
  const uint32_t bits = bits_of(value), random = (word * 0x9e3779b1u) >> 16;
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits ^ sign;
  const uint32_t carried = (magnitude - 0x38000000u + (random >> 3)) >> 13;
  const uint32_t normal = carried > 0x7c00u ? 0x7c00u : carried;
  // A subnormal is a multiple of 2^-24.
  const bool is_small = magnitude < 0x38800000u;
  const float scaled = float_of(is_small ? magnitude : 0u) * 16777216.0f;
  const uint32_t small = (static_cast<uint32_t>(static_cast<int32_t>(scaled * 65536.0f)) + random) >> 16;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t result = magnitude > 0x7f800000u ? nan : is_small ? small : normal;
  out.bits = static_cast<uint16_t>(result | sign >> 16);
}

// A master of 24 bits: the bfloat16 parameter and the upper 8 of the 16 bits that it lacks. A remainder
// counts as 0 beside zeros and beside what is not finite, where it could make a NaN.
FO_HOST_DEVICE inline float load_split8(bfloat16 param, int8_t remainder) {
  const uint32_t upper = static_cast<uint32_t>(param.bits) << 16;
  const uint32_t magnitude = upper & 0x7fffffffu;
  const uint32_t whole = upper + (static_cast<uint32_t>(static_cast<int32_t>(remainder)) << 8);
  return float_of(magnitude - 1u < 0x7f7fffffu ? whole : upper);
}

FO_HOST_DEVICE inline void store_split8(bfloat16& param, int8_t& remainder, float value, uint32_t word) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t whole = (bits + (word & 255u)) & ~255u;
  const uint32_t upper = nan ? 0x7fc0u : (whole + 0x8000u) >> 16;
  param.bits = static_cast<uint16_t>(upper);
  const uint32_t rest = (whole - (upper << 16)) >> 8;
  remainder = static_cast<int8_t>(nan ? 0u : rest);
}

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
