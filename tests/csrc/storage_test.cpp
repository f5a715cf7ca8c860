// Holds csrc/storage.h to a reference that shares no code with it: every 16-bit number, and floats through
// every rounding boundary. `storage_test` checks floats around all 16-bit numbers; `storage_test all` every
// float there is.
#include "storage.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>

namespace {

// A format of `exponent_bits` and `mantissa_bits`, by its definition and in double, which holds all of them.
struct Format {
  int exponent_bits, mantissa_bits;

  double value(uint16_t bits) const {
    const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) {
      return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                           : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }

  // Nearest, ties to even, by comparing the distances to both neighbours; the bits of positive numbers are in
  // order.
  uint16_t nearest(double x) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double magnitude = std::fabs(x);
    const auto infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
    uint16_t low = 0, high = infinity;
    if (magnitude == value(infinity)) return static_cast<uint16_t>(sign | infinity);
    while (high - low > 1) {
      const auto middle = static_cast<uint16_t>((low + high) / 2);
      (value(middle) <= magnitude ? low : high) = middle;
    }
    // What lies beyond the largest number is where the next one would be if the exponent had room.
    const double above =
        high == infinity ? 2 * value(low) - value(static_cast<uint16_t>(low - 1)) : value(high);
    const double down = magnitude - value(low), up = above - magnitude;
    const uint16_t chosen = down < up ? low : up < down ? high : low % 2 == 0 ? low : high;
    return static_cast<uint16_t>(sign | chosen);
  }
};

constexpr Format kBfloat16{8, 7}, kFloat16{5, 10};
long failures = 0;

float float_from(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Storage>
void check_load(const char* name, const Format& format) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double expected = format.value(static_cast<uint16_t>(bits));
    const float got = fused_optim::load(Storage{static_cast<uint16_t>(bits)});
    const bool good = std::isnan(expected) ? std::isnan(got)
                                           : got == expected && std::signbit(got) == std::signbit(expected);
    if (!good && ++failures < 10) std::printf("load %s %04x: %a, expected %a\n", name, bits, got, expected);
  }
}

template <class Storage>
void check_store(const char* name, const Format& format, uint32_t bits) {
  const float value = float_from(bits);
  Storage out{0};
  fused_optim::store(out, value);
  bool good;
  if (std::isnan(value)) {
    good = std::isnan(format.value(out.bits));
  } else {
    good = out.bits == format.nearest(value);
  }
  if (!good && ++failures < 10) {
    std::printf("store %s %a (%08x): %04x, expected %04x\n", name, value, bits, out.bits,
                format.nearest(value));
  }
}

void check_float(uint32_t bits) {
  check_store<fused_optim::bfloat16>("bfloat16", kBfloat16, bits);
  check_store<fused_optim::float16>("float16", kFloat16, bits);
}

// The floats next to each number of a format and next to each midpoint between two.
void check_boundaries(const Format& format) {
  for (uint32_t bits = 0; bits < 0x7fff; ++bits) {
    const double low = format.value(static_cast<uint16_t>(bits));
    const double high = format.value(static_cast<uint16_t>(bits + 1));
    if (!std::isfinite(low)) continue;
    const double middle = std::isfinite(high)
                              ? (low + high) / 2
                              : low + (low - format.value(static_cast<uint16_t>(bits - 1))) / 2;
    for (const double centre : {low, middle}) {
      const auto nearest = static_cast<float>(centre);
      uint32_t word;
      std::memcpy(&word, &nearest, sizeof word);
      for (uint32_t near = word < 2 ? 0 : word - 2; near <= word + 2; ++near) {
        check_float(near);
        check_float(near | 0x80000000u);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  check_load<fused_optim::bfloat16>("bfloat16", kBfloat16);
  check_load<fused_optim::float16>("float16", kFloat16);
  if (argc > 1 && std::strcmp(argv[1], "all") == 0) {
    uint32_t bits = 0;
    do check_float(bits);
    while (++bits != 0);
  } else {
    check_boundaries(kBfloat16);
    check_boundaries(kFloat16);
    for (uint64_t bits = 0; bits < 0x100000000u; bits += 9973) check_float(static_cast<uint32_t>(bits));
    for (uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7fc00000u, 0x7f80ffffu})
      check_float(nan);
  }
  std::printf("%ld failures\n", failures);
  return failures != 0;
}
