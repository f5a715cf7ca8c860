// A float whose root and quotient take no branch: what a rule computes with where nothing is out of the
// ordinary.
//
// IEEE's root and quotient begin with a test of each operand and leave for a subroutine where it fails. A
// loop with such branches is issued in pieces. QuickFloat's are a first approximation by the processor and a
// few fused multiply-adds; they end at IEEE's result, or at a NaN where they cannot be sure of it. A NaN
// reaches whatever is computed from it, so a rule needs no word about this: where none of its results is NaN
// they are the bits that float gives, and where one is, the caller computes again with float.
//
// Sure are: the root of every number below 2^64, zero and subnormal numbers included; and the quotient, as
// far as it does not overflow, of a dividend that is zero or at least 2^-100 and a positive divisor of at
// most 2^24, unless that is just below a power of 2. tests/csrc/quick_float_test.cpp proves it for every
// first approximation that is off by up to 2 units in the last place.
#pragma once

#include <cmath>
#include <cstdint>

#include "rules/rule.h"
#include "storage.h"

namespace fused_optim {

#if defined(__CUDA_ARCH__)
FO_HOST_DEVICE inline float approximate_reciprocal_root(float value) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
FO_HOST_DEVICE inline float approximate_reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
#else
// What those instructions make of subnormal numbers.
inline float flush(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }
inline float approximate_reciprocal_root(float value) { return flush(1 / std::sqrt(flush(value))); }
inline float approximate_reciprocal(float value) { return flush(1 / flush(value)); }
#endif

// Of a number from 2^-70 to 2^64, from an approximation of 1 / sqrt(value).
FO_HOST_DEVICE inline float root_of_normal(float value, float approximation) {
  const float first = value * approximation, half = 0.5f * approximation;
  const float wrong = fmaf(-first, half, 0.5f);
  const float root = fmaf(first, wrong, first), half_reciprocal = fmaf(half, wrong, half);
  return fmaf(fmaf(-root, root, value), half_reciprocal, root);
}

// `approximation` is that of 1 / sqrt(shifted(value)). The root is taken of value * 2^64, so that nothing on
// the way is subnormal; from 2^64 on this overflows and ends at a NaN, as a negative value does. A zero has
// a finite reciprocal root through the addition, which is below half a unit of every other number.
FO_HOST_DEVICE inline float shifted(float value) { return value * 0x1p64f + 0x1p-110f; }

FO_HOST_DEVICE inline float quick_root(float value, float approximation) {
  return root_of_normal(value * 0x1p64f, approximation) * 0x1p-32f;
}

// `approximation` is that of 1 / divisor. The bounds keep the residual, which has to be exact, and the
// quotient from being subnormal. A divisor above them has a reciprocal of 0; one that is no normal number, of
// infinity, which ends at a NaN. Divisors just below a power of 2 have reciprocals that one step does not
// round correctly.
FO_HOST_DEVICE inline float quick_quotient(float dividend, float divisor, float approximation) {
  const float reciprocal = fmaf(approximation, fmaf(-divisor, approximation, 1.0f), approximation);
  const float quotient = dividend * reciprocal;
  // With its sign turned, so that a quotient of -0 stays one.
  const float residual = fmaf(divisor, quotient, -dividend);
  const float result = fmaf(residual, -reciprocal, quotient);
  const uint32_t bits = bits_of(divisor);
  const bool sure =
      (fabsf(dividend) >= 0x1p-100f || dividend == 0) && bits <= bits_of(0x1p24f) && (~bits & 0x7ffff8u) != 0;
  return sure ? result : float_of(0x7fffffffu);
}

// Of bounds that are not zero: then which zero is the larger is no question.
FO_HOST_DEVICE inline float quick_clamp(float value, float min, float max) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(min));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(result), "f"(max));
  return result;
#else
  value = value < min ? min : value;
  return value > max ? max : value;
#endif
}

// The larger of two, or NaN if either is.
FO_HOST_DEVICE inline float quick_maximum(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return maximum(a, b);
#endif
}

struct QuickFloat {
  float value;

  QuickFloat() = default;
  FO_HOST_DEVICE QuickFloat(float value_) : value(value_) {}
  FO_HOST_DEVICE explicit operator double() const { return static_cast<double>(value); }

  FO_HOST_DEVICE friend QuickFloat operator+(QuickFloat a, QuickFloat b) { return a.value + b.value; }
  FO_HOST_DEVICE friend QuickFloat operator-(QuickFloat a, QuickFloat b) { return a.value - b.value; }
  FO_HOST_DEVICE friend QuickFloat operator*(QuickFloat a, QuickFloat b) { return a.value * b.value; }
  FO_HOST_DEVICE friend QuickFloat operator/(QuickFloat a, QuickFloat b) {
    return quick_quotient(a.value, b.value, approximate_reciprocal(b.value));
  }
  FO_HOST_DEVICE friend QuickFloat square_root(QuickFloat a) {
    return quick_root(a.value, approximate_reciprocal_root(shifted(a.value)));
  }
  FO_HOST_DEVICE friend QuickFloat clamp(QuickFloat a, QuickFloat min, QuickFloat max) {
    return quick_clamp(a.value, min.value, max.value);
  }
  FO_HOST_DEVICE friend QuickFloat operator-(QuickFloat a) { return -a.value; }
  FO_HOST_DEVICE friend bool operator<(QuickFloat a, QuickFloat b) { return a.value < b.value; }
  FO_HOST_DEVICE friend bool operator>(QuickFloat a, QuickFloat b) { return a.value > b.value; }
  FO_HOST_DEVICE friend bool operator!=(QuickFloat a, QuickFloat b) { return a.value != b.value; }
};

}  // namespace fused_optim
