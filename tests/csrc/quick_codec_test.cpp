// Compares csrc/cuda/quick_codec.h with csrc/codec.h: every mantissa that a share of a group's power of two
// may have, every code beside every scale, every parameter beside every remainder; and random numbers of
// every size. Where the quick form says that it is not sure, there is nothing to compare.
//
// `quick_codec_test some` takes every 61st of each.
#include "cuda/quick_codec.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

using namespace fused_optim;

namespace {

long failures = 0, tried = 0;

void check(bool right, const char* what, uint32_t one, uint32_t other, uint32_t got, uint32_t expected) {
  ++tried;
  if (right) return;
  std::printf("%s of %08x and %08x: %08x, not %08x\n", what, one, other, got, expected);
  if (++failures == 10) std::exit(1);
}

// Four elements of one group, whose largest is the first.
template <class Quick>
void check_encoding(const float (&numbers)[4], const uint32_t (&words)[4], const char* what) {
  using Code = typename Quick::Code;
  QuickFloat values[4];
  float largest = 0;
  int32_t most = 0;
  for (int k = 0; k < 4; ++k) {
    values[k] = numbers[k];
    largest = quick_maximum(largest, Quick::for_largest(values[k]));
    const int32_t bits = magnitude_bits(Code::magnitude(numbers[k]));
    most = bits > most ? bits : most;
  }
  int32_t exponent;
  if (!quick_exponent<Quick>(Quick::magnitude_of(largest), exponent)) {
    check(static_cast<uint32_t>(most) > bits_of(Code::kFloor == 0 ? 0x1p126f : 0x1.fffffep31f), what,
          bits_of(numbers[0]), 0, 0, static_cast<uint32_t>(most));
    return;
  }
  const int32_t expected = group_exponent<Code>(most);
  check(exponent == expected, "exponent", bits_of(numbers[0]), 0, static_cast<uint32_t>(exponent),
        static_cast<uint32_t>(expected));
  const float inverse = power_of_two(254 - exponent);
  const uint32_t codes = Quick::encode(values, inverse, words);
  for (int k = 0; k < 4; ++k) {
    const auto code = static_cast<uint32_t>(
        encode<Code>(numbers[k], Code::magnitude(numbers[k]), inverse, words[k]) & 0xff);
    check((codes >> 8 * k & 255u) == code, what, bits_of(numbers[k]), words[k], codes >> 8 * k & 255u, code);
  }
}

template <class Quick>
void check_decoding(uint32_t code, int32_t exponent) {
  using Storage = typename Quick::Code::Storage;
  float scale;
  const bool sure = quick_scale<Quick>(exponent, scale) && Quick::not_finite(code * 0x01010101u) == 0;
  const float number = decode(static_cast<Storage>(code), power_of_two(exponent));
  if (!sure) {
    const bool odd = exponent < Quick::Code::kLeast || !(number - number == 0);
    check(odd, "a code that is not sure", code, static_cast<uint32_t>(exponent), 0, 0);
    return;
  }
  for (int k = 0; k < 4; ++k) {
    const float quick = Quick::decode(code << 8 * k, k, scale);
    const bool same = bits_of(quick) == bits_of(number) || (number != number && quick != quick);
    check(same, "a code", code, static_cast<uint32_t>(exponent), bits_of(quick), bits_of(number));
  }
}

void check_split8(uint32_t param, uint32_t remainder) {
  const uint32_t params[2] = {param | 0x3f80u << 16, 0x8000u | param << 16};
  float whole[4];
  load_split8(params, remainder | (remainder ^ 255u) << 8 | remainder << 16 | remainder << 24, whole);
  const bfloat16 halves[4] = {
      {static_cast<uint16_t>(param)}, {0x3f80}, {0x8000}, {static_cast<uint16_t>(param)}};
  const uint32_t remainders[4] = {remainder, remainder ^ 255u, remainder, remainder};
  for (int k = 0; k < 4; ++k) {
    const float expected = load_split8(halves[k], static_cast<int8_t>(remainders[k]));
    check(bits_of(whole[k]) == bits_of(expected), "a master", halves[k].bits, remainders[k],
          bits_of(whole[k]), bits_of(expected));
  }
}

void check_rounding(const float (&numbers)[4], const uint32_t (&words)[4]) {
  QuickFloat values[4];
  for (int k = 0; k < 4; ++k) values[k] = numbers[k];
  uint32_t params[2], remainders;
  store_split8(values, words, params, remainders);
  const uint32_t stochastic[2] = {pack_stochastically(values, words),
                                  pack_stochastically(values + 2, words + 2)};
  for (int k = 0; k < 4; ++k) {
    if (numbers[k] != numbers[k]) continue;  // computed again
    bfloat16 param;
    int8_t remainder;
    store_split8(param, remainder, numbers[k], words[k]);
    const uint32_t half = params[k / 2] >> 16 * (k % 2) & 0xffffu;
    check(half == param.bits, "a split parameter", bits_of(numbers[k]), words[k], half, param.bits);
    const uint32_t byte = remainders >> 8 * k & 255u;
    check(byte == static_cast<uint8_t>(remainder), "a remainder", bits_of(numbers[k]), words[k], byte,
          static_cast<uint8_t>(remainder));
    store_stochastically(param, numbers[k], words[k]);
    const uint32_t rounded = stochastic[k / 2] >> 16 * (k % 2) & 0xffffu;
    check(rounded == param.bits, "a rounded parameter", bits_of(numbers[k]), words[k], rounded, param.bits);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t stride = argc > 1 && std::strcmp(argv[1], "some") == 0 ? 61 : 1;
  std::mt19937 random(1);
  const auto next = [&] { return static_cast<uint32_t>(random()); };
  for (uint32_t mantissa = 0; mantissa < 0x800000; mantissa += stride) {
    // Shares from 1/4 to 1, and one that is smaller; for roots of roots the squares' exponents are twice
    // these.
    const float numbers[4] = {1.0f, float_of(0x3f000000u | mantissa), -float_of(0x3e800000u | mantissa),
                              float_of((0x30000000u + (next() & 0x0f000000u)) | mantissa)};
    const uint32_t words[4] = {next(), next(), next(), next()};
    check_encoding<QuickMeans>(numbers, words, "a mean");
    const float squares[4] = {1.0f, numbers[1], -numbers[2], numbers[3]};
    check_encoding<QuickRoots>(squares, words, "a root");
  }
  for (uint32_t i = 0; i < 8000000; i += stride) {  // any bits, near each other and not
    const uint32_t size = next(), near = i % 4 == 0 ? 0xffffffffu : i % 4 == 1 ? 0x80ffffffu : 0x83ffffffu;
    float numbers[4], squares[4];
    uint32_t words[4];
    for (int k = 0; k < 4; ++k) {
      const uint32_t bits = (next() & near) | (size & ~near);
      numbers[k] = float_of(i % 64 == 5 && k == 2 ? bits & 0x80000000u : bits);
      squares[k] = float_of(bits_of(numbers[k]) & 0x7fffffffu);
      words[k] = next();
    }
    check_encoding<QuickMeans>(numbers, words, "a mean");
    check_encoding<QuickRoots>(squares, words, "a root");
    check_rounding(numbers, words);
  }
  for (uint32_t code = 0; code < 256; ++code) {
    for (int32_t exponent = 0; exponent < 256; ++exponent) {
      check_decoding<QuickMeans>(code, exponent);
      check_decoding<QuickRoots>(code, exponent);
    }
  }
  for (uint32_t pair = 0; pair < 0x1000000; pair += stride) check_split8(pair & 0xffffu, pair >> 16);
  std::printf("%ld tried, %ld failures\n", tried, failures);
  return failures != 0;
}
