// Number formats as bits. The same code runs on the host, in every SIMD build, and on the device.
//
// A rule sees float or double only: `load` widens, `store` rounds once, to nearest, ties to even.
#pragma once

#include <cstdint>

#include "row.h"
#include "rules/rule.h"

namespace fused_optim {
inline namespace FO_INSTRUCTION_SET {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

FO_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

FO_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

FO_HOST_DEVICE inline float load(float value) { return value; }
FO_HOST_DEVICE inline double load(double value) { return value; }
FO_HOST_DEVICE inline float load(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

FO_HOST_DEVICE inline float load(float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t infinite = magnitude + 0x70000000u;
  // A subnormal becomes a normal float by a subtraction that is exact.
  const uint32_t subnormal = bits_of(float_of(magnitude + 0x38800000u) - float_of(0x38800000u));
  const uint32_t result = exponent == 0x0f800000u ? infinite : exponent == 0 ? subnormal : normal;
  return float_of(result | static_cast<uint32_t>(value.bits & 0x8000) << 16);
}

FO_HOST_DEVICE inline void store(float& out, float value) { out = value; }
FO_HOST_DEVICE inline void store(double& out, double value) { out = value; }

FO_HOST_DEVICE inline void store(bfloat16& out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

FO_HOST_DEVICE inline void store(float16& out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits ^ sign;
  // A NaN keeps its upper bits and becomes quiet, as the processor's own conversion has it.
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
  // Adding one half lets the float adder round a subnormal result to nearest even.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t result = magnitude >= 0x47800000u ? infinite : magnitude < 0x38800000u ? subnormal : normal;
  out.bits = static_cast<uint16_t>(result | sign >> 16);
}

// A bfloat16 parameter beside a master weight is rounded to nearest, ties away from zero: then the float32
// bits are the parameter's bits plus a signed 16-bit remainder, and a split master is the float32 master bit
// for bit.
FO_HOST_DEVICE inline void store_ties_away(bfloat16& out, float value) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x8000u) >> 16);
}

FO_HOST_DEVICE inline void store_ties_away(float16& out, float value) { store(out, value); }

// The parameter is what counts, also where it has been written since the last step. A master weight that
// still rounds to its parameter adds the bits below it; any other is the master of a number that is gone.
template <class Param>
FO_HOST_DEVICE inline bool rounds_to(Param param, float master) {
  Param rounded;
  store_ties_away(rounded, master);
  return rounded.bits == param.bits;
}

template <class Param>
FO_HOST_DEVICE inline float load_master(Param param, float master) {
  return rounds_to(param, master) ? master : load(param);
}

// A remainder belongs to every parameter but those with which it would make a NaN: a negative one beside
// zero, a positive one beside an infinity. There it counts as 0.
FO_HOST_DEVICE inline float load_split(bfloat16 param, int16_t remainder) {
  const uint32_t upper = static_cast<uint32_t>(param.bits) << 16;
  const uint32_t whole = upper + static_cast<uint32_t>(static_cast<int32_t>(remainder));
  return float_of((whole & 0x7fffffffu) > 0x7f800000u ? upper : whole);
}

FO_HOST_DEVICE inline void store_split(bfloat16& param, int16_t& remainder, float value) {
  store_ties_away(param, value);
  const bool nan = value != value;
  remainder = static_cast<int16_t>(nan ? 0u : bits_of(value) - (static_cast<uint32_t>(param.bits) << 16));
}

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
