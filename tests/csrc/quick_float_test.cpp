// Proves that the root and the quotient of csrc/cuda/quick_float.h are IEEE's wherever they are not NaN, for
// every first approximation that is off by up to 2 units in the last place: what the processor's instructions
// promise is less (rsqrt.approx 2^-22.9 of the value, rcp.approx 1 unit).
//
// Root: every mantissa, with both parities of the exponent, and every subnormal number. Multiplying by 4
// changes nothing but exponents as long as none leaves its range; the ends of the range are tried as well.
//
// Quotient: let q be the quotient before its correction, and r the reciprocal. The corrected one is rounded
// from a number that is within 2^-22 units in the last place of the true quotient: q is off by less than 2
// units, r by less than 2^-23 of itself (which is checked for every divisor), and the residual loses at most
// one bit. So it can only be wrong where the true quotient is as near as that to the middle M between two
// floats: where dividend * 2^s - divisor * M is an integer k of at most 16 in magnitude. All those pairs are
// enumerated, and tried; 10^8 random pairs beside them.
//
// `quick_float_test some` takes every 61st mantissa and divisor, the 64 at either end, and 10^6 pairs.
#include "cuda/quick_float.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

using fused_optim::bits_of;
using fused_optim::float_of;

namespace {

constexpr int kMostOff = 2;
constexpr uint32_t kMantissas = 0x800000, kEnd = 64;
long failures = 0, tried = 0;

// Ends the program at the tenth.
void report(const char* what, float one, float other, int off, float got) {
  std::printf("%s of %a and %a, approximation %d off: %a\n", what, one, other, off, got);
  if (++failures == 10) std::exit(1);
}

uint32_t mantissa_after(uint32_t mantissa, uint32_t stride) {
  const uint32_t last = kMantissas - kEnd;
  if (mantissa < kEnd || mantissa >= last) return mantissa + 1;
  return mantissa + stride < last ? mantissa + stride : last;
}

// By less than 2^-20 of itself: there the quotient may be a NaN.
bool is_below_a_power(float value) { return (bits_of(value) & 0x7ffff8u) == 0x7ffff8u; }

float moved(float value, int units) {
  return float_of(bits_of(value) + static_cast<uint32_t>(units));  // of a positive number
}

bool same(float got, float expected) { return bits_of(got) == bits_of(expected); }

void check_root(float value) {
  const float expected = std::sqrt(value);
  const float first = static_cast<float>(1 / std::sqrt(static_cast<double>(fused_optim::shifted(value))));
  for (int off = -kMostOff; off <= kMostOff; ++off) {
    const float got = fused_optim::quick_root(value, moved(first, off));
    ++tried;
    if (!same(got, expected)) report("root", value, value, off, got);
  }
}

void check_quotient(float dividend, float divisor) {
  const float expected = dividend / divisor;
  const float first = static_cast<float>(1 / static_cast<double>(divisor));
  for (int off = -kMostOff; off <= kMostOff; ++off) {
    const float got = fused_optim::quick_quotient(dividend, divisor, moved(first, off));
    ++tried;
    const bool promised = !is_below_a_power(divisor);
    if ((promised || !std::isnan(got)) && !same(got, expected))
      report("quotient", dividend, divisor, off, got);
  }
}

// What the proof takes for granted of the reciprocal after its Newton step: exact in double.
void check_reciprocal(float divisor) {
  const float first = static_cast<float>(1 / static_cast<double>(divisor));
  for (int off = -kMostOff; off <= kMostOff; ++off) {
    const float approximation = moved(first, off);
    const float reciprocal = fmaf(approximation, fmaf(-divisor, approximation, 1.0f), approximation);
    const double wrong = 1 - static_cast<double>(divisor) * static_cast<double>(reciprocal);
    ++tried;
    if (std::fabs(wrong) >= 0x1p-23) report("reciprocal", divisor, divisor, off, reciprocal);
  }
}

// Every dividend whose quotient by `divisor` is next to the middle between two floats.
void check_hard_quotients(uint32_t divisor) {
  constexpr int kNearest = 16;
  int zeros = 0;
  while ((divisor >> zeros & 1u) == 0) ++zeros;
  const uint32_t odd = divisor >> zeros;
  uint32_t inverse = odd;  // of odd, modulo 2^32: each step doubles the bits that are right
  for (int i = 0; i < 5; ++i) inverse *= 2 - odd * inverse;
  for (int shift = 24; shift <= 25; ++shift) {  // a quotient of at least 1, or less
    const uint64_t period = uint64_t{1} << (shift - zeros > 0 ? shift - zeros : 0);
    for (int k = -kNearest; k <= kNearest; ++k) {
      if (k % (1 << (zeros < 6 ? zeros : 6)) != 0 || k == 0) continue;
      const uint64_t first = (0 - static_cast<uint64_t>(static_cast<int64_t>(k >> zeros)) * inverse) % period;
      for (uint64_t middle = (uint64_t{1} << 24) / period * period + first; middle < uint64_t{1} << 25;
           middle += period) {
        const uint64_t shifted = middle * divisor + static_cast<uint64_t>(static_cast<int64_t>(k));
        const uint64_t dividend = shifted >> shift;
        if (middle % 2 == 0 || shifted % (uint64_t{1} << shift) != 0) continue;
        if (dividend < 0x800000 || dividend >= 0x1000000) continue;
        check_quotient(static_cast<float>(dividend), static_cast<float>(divisor));
      }
    }
  }
}

// Any numbers: IEEE's result or a NaN; and no NaN where the header promises a result.
void check_any(float dividend, float divisor) {
  const float quotient = fused_optim::quick_quotient(dividend, divisor,  //
                                                     fused_optim::approximate_reciprocal(divisor));
  const float size = std::fabs(dividend);
  const bool promised = (size >= 0x1p-100f || size == 0) && size <= 0x1p60f && divisor >= 0x1p-60f &&
                        divisor <= 0x1p24f && !is_below_a_power(divisor);
  ++tried;
  if ((promised || !std::isnan(quotient)) && !same(quotient, dividend / divisor))
    report("quotient", dividend, divisor, 0, quotient);
  const float root = fused_optim::quick_root(
      dividend, fused_optim::approximate_reciprocal_root(fused_optim::shifted(dividend)));
  const bool has_root = dividend >= 0 && dividend < 0x1p64f;
  if ((has_root || !std::isnan(root)) && !same(root, std::sqrt(dividend)))
    report("root", dividend, dividend, 0, root);
}

}  // namespace

int main(int argc, char** argv) {
  const bool some = argc > 1 && std::strcmp(argv[1], "some") == 0;
  std::mt19937 random(1);
  const auto next = [&] { return static_cast<uint32_t>(random()); };
  for (uint32_t exponent = 0; exponent < 0x1fe; ++exponent) {  // both ends of every range, and both signs
    for (int i = 0; i < (some ? 200 : 20000); ++i) {
      const uint32_t high = (exponent << 23) | (exponent & 0x100) << 23;
      check_any(float_of(high ^ (next() & 0x7fffffu)), float_of(next()));
      check_any(float_of(next()), float_of(high ^ (next() & 0x7fffffu)));
    }
  }
  constexpr float kCorners[] = {0.0f,      -0.0f,    0x1p-149f, 0x1p-126f, -0x1p-126f, 0x1p-101f,
                                0x1p-100f, 1.0f,     -1.0f,     0x1p24f,   0x1p25f,    0x1p63f,
                                0x1p64f,   0x1p126f, 0x1p127f,  INFINITY,  -INFINITY,  NAN};
  for (const float one : kCorners) {
    for (const float other : kCorners) check_any(one, other);
  }
  const uint32_t stride = some ? 61 : 1;
  for (uint32_t mantissa = 0; mantissa < kMantissas; mantissa = mantissa_after(mantissa, stride)) {
    check_root(float_of(0x3f800000u + mantissa));
    check_root(float_of(0x40000000u + mantissa));
    if (mantissa != 0) check_root(float_of(mantissa));
    check_reciprocal(float_of(0x3f800000u + mantissa));
    check_hard_quotients(kMantissas + mantissa);
  }
  for (long i = 0; i < (some ? 1000000 : 100000000); ++i)
    check_quotient(float_of(0x3f800000u + (next() & 0x7fffffu)),
                   float_of(0x3f800000u + (next() & 0x7fffffu)));
  std::printf("%ld tried, %ld failures\n", tried, failures);
  return failures != 0;
}
