// Holds csrc/storage.h to a reference that shares no code with it: every 16-bit number, and floats through
// every rounding boundary. `storage_test` checks floats around all 16-bit numbers, and remainders beside the
// corners of bfloat16; `storage_test all` every float and every pair of parameter and remainder there is.
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
  const char* name;
  int exponent_bits, mantissa_bits;

  double value(uint32_t bits) const {
    const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) {
      return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                           : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }

  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }
};

// Rounds to nearest, ties to even, by comparing the distances to the two neighbours. The neighbour below is
// looked for from where the last one was found: numbers that come in order cost nothing.
class Rounding {
 public:
  explicit Rounding(const Format& format) : format_(format), infinity_(format.infinity()) {
    for (uint32_t bits = 0; bits < infinity_; ++bits) table_[bits] = format.value(bits);
    // What lies beyond the largest number is where the next one would be if the exponent had room.
    table_[infinity_] = 2 * table_[infinity_ - 1] - table_[infinity_ - 2];
  }

  uint16_t nearest(float x) {
    const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
    const double magnitude = std::fabs(static_cast<double>(x));
    if (magnitude >= table_[infinity_]) return static_cast<uint16_t>(sign | infinity_);
    if (!(table_[low_] <= magnitude && magnitude < table_[low_ + 1])) {
      if (!(table_[low_ + 1] <= magnitude && low_ + 2 <= infinity_ && magnitude < table_[low_ + 2])) {
        uint32_t high = infinity_;
        for (low_ = 0; high - low_ > 1;) {
          const uint32_t middle = (low_ + high) / 2;
          (table_[middle] <= magnitude ? low_ : high) = middle;
        }
      } else {
        ++low_;
      }
    }
    const double down = magnitude - table_[low_], up = table_[low_ + 1] - magnitude;
    const bool lower = down < up || (down == up && low_ % 2 == 0);
    return static_cast<uint16_t>(sign | (lower ? low_ : low_ + 1));
  }

  const Format& format() const { return format_; }

 private:
  const Format& format_;
  uint32_t infinity_;
  uint32_t low_ = 0;
  double table_[0x8000];
};

constexpr Format kBfloat16{"bfloat16", 8, 7}, kFloat16{"float16", 5, 10};
long failures = 0;

float float_from(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Storage>
void check_load(const Format& format) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double expected = format.value(bits);
    const float got = fused_optim::load(Storage{static_cast<uint16_t>(bits)});
    const bool good = std::isnan(expected) ? std::isnan(got)
                                           : got == expected && std::signbit(got) == std::signbit(expected);
    if (!good && ++failures < 10)
      std::printf("load %s %04x: %a, expected %a\n", format.name, bits, got, expected);
  }
}

template <class Storage>
void check_store(Rounding& rounding, uint32_t bits) {
  const float value = float_from(bits);
  Storage out{0};
  fused_optim::store(out, value);
  const bool nan = std::isnan(value);
  const bool good = nan ? std::isnan(rounding.format().value(out.bits)) : out.bits == rounding.nearest(value);
  if (!good && ++failures < 10) {
    std::printf("store %s %a (%08x): %04x\n", rounding.format().name, value, bits, out.bits);
  }
}

void check_float(uint32_t bits) {
  static Rounding bfloat16(kBfloat16), float16(kFloat16);
  check_store<fused_optim::bfloat16>(bfloat16, bits);
  check_store<fused_optim::float16>(float16, bits);
}

// The floats next to each number of a format and next to each midpoint between two.
void check_boundaries(const Format& format) {
  for (uint32_t bits = 0; bits < 0x7fff; ++bits) {
    const double low = format.value(bits);
    const double high = format.value(bits + 1);
    if (!std::isfinite(low)) continue;
    const double middle = (std::isfinite(high) ? low + high : 3 * low - format.value(bits - 1)) / 2;
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

// A remainder counts where the pair is the split of some float, and nowhere else.
void check_split(uint32_t upper, int32_t remainder) {
  const fused_optim::bfloat16 param{static_cast<uint16_t>(upper)};
  const float sum = float_from((upper << 16) + static_cast<uint32_t>(remainder));
  fused_optim::bfloat16 param_again{0};
  int16_t remainder_again = 0;
  fused_optim::store_split(param_again, remainder_again, sum);
  const bool is_split = !std::isnan(sum) && param_again.bits == param.bits && remainder_again == remainder;
  const float expected = is_split ? sum : fused_optim::load(param);
  const float got = fused_optim::load_split(param, static_cast<int16_t>(remainder));
  const bool good =
      std::isnan(expected) ? std::isnan(got) : got == expected && std::signbit(got) == std::signbit(expected);
  if ((!good || std::isnan(got) != std::isnan(fused_optim::load(param))) && ++failures < 10) {
    std::printf("split %04x %d: %a, expected %a\n", upper, remainder, got, expected);
  }
}

// A master counts where it rounds to the parameter, and nowhere else.
template <class Param>
void check_master(uint32_t bits) {
  const float master = float_from(bits);
  Param rounded{0};
  fused_optim::store_ties_away(rounded, master);
  for (const uint32_t difference : {0u, 1u, 0xffffu, 0x8000u}) {
    const Param param{static_cast<uint16_t>(rounded.bits + difference)};
    const float expected = difference == 0 ? master : fused_optim::load(param);
    const float got = fused_optim::load_master(param, master);
    const bool good = std::isnan(expected) ? std::isnan(got)
                                           : got == expected && std::signbit(got) == std::signbit(expected);
    if (!good && ++failures < 10) std::printf("master %a beside %04x: %a\n", master, param.bits, got);
  }
}

}  // namespace

int main(int argc, char** argv) {
  check_load<fused_optim::bfloat16>(kBfloat16);
  check_load<fused_optim::float16>(kFloat16);
  if (argc > 1 && std::strcmp(argv[1], "all") == 0) {
    uint32_t bits = 0;
    do {
      check_float(bits);
      check_split(bits >> 16, static_cast<int16_t>(bits));
      check_master<fused_optim::bfloat16>(bits);
      check_master<fused_optim::float16>(bits);
    } while (++bits != 0);
  } else {
    check_boundaries(kBfloat16);
    check_boundaries(kFloat16);
    for (uint64_t bits = 0; bits < 0x100000000u; bits += 9973) check_float(static_cast<uint32_t>(bits));
    for (uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7fc00000u, 0x7f80ffffu})
      check_float(nan);
  }
  for (const uint32_t sign : {0u, 0x8000u}) {
    for (const uint32_t corner :
         {0x0000u, 0x0001u, 0x007fu, 0x0080u, 0x3f80u, 0x7f7fu, 0x7f80u, 0x7f81u, 0x7fc0u}) {
      for (int32_t remainder = -0x8000; remainder < 0x8000; ++remainder) {
        check_split(sign | corner, remainder);
        check_master<fused_optim::bfloat16>((corner << 16) + static_cast<uint32_t>(remainder));
        check_master<fused_optim::float16>((corner << 16) + static_cast<uint32_t>(remainder));
      }
    }
  }
  std::printf("%ld failures\n", failures);
  return failures != 0;
}
