// Rows whose two states are codes, in AVX-512's own words: 1.3 times as fast as what the compiler makes of
// the loops in tiles.h (measured), bit for bit the same. A group of 32 elements is two registers. Its codes
// are decoded and its elements updated without a way through memory; the codes of both states are made in a
// second loop over the tile, so that no group waits for its own largest magnitude. Part of kernels.cpp.
#pragma once

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FO_HAS_CODES_AVX512

#include <immintrin.h>

#include "cpu/tiles.h"

namespace fused_optim {
namespace {

// Sixteen floats, as the numbers of a rule.
struct Floats {
  __m512 lanes;
};
constexpr int kFloats = 16;
static_assert(kGroup == 2 * kFloats);

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }
inline Floats square_root(Floats value) { return {_mm512_sqrt_ps(value.lanes)}; }
inline Floats repeated(float value) { return {_mm512_set1_ps(value)}; }
inline __m512i repeated_word(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
inline __m512i words_of(Floats value) { return _mm512_castps_si512(value.lanes); }

inline Floats load_floats(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store_floats(float* to, Floats value) { _mm512_storeu_ps(to, value.lanes); }

inline Floats absolute(Floats value) {
  return {_mm512_castsi512_ps(_mm512_and_si512(words_of(value), repeated_word(0x7fffffffu)))};
}

// As prepare.h's: of two numbers of which one is NaN, these instructions take the second.
inline Floats clamp(Floats value, Floats min, Floats max) {
  return {_mm512_min_ps(max.lanes, _mm512_max_ps(min.lanes, value.lanes))};
}

// A struct of Floats from one of floats.
template <class Wide, class Narrow>
Wide repeated_each(const Narrow& numbers) {
  constexpr int kCount = sizeof(Narrow) / sizeof(float);
  static_assert(sizeof(Wide) == kCount * sizeof(Floats), "there is more in it than floats");
  float narrow[kCount];
  Floats wide[kCount];
  __builtin_memcpy(narrow, &numbers, sizeof narrow);
  for (int k = 0; k < kCount; ++k) wide[k] = repeated(narrow[k]);
  Wide result;
  __builtin_memcpy(static_cast<void*>(&result), wide, sizeof result);
  return result;
}

inline Floats load_codes(const int8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
inline Floats load_codes(const uint8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}

inline bool are_finite(const int8_t* means, const uint8_t* roots, int64_t n) {
  const __m256i mean_not = _mm256_set1_epi8(static_cast<char>(MeanCode::kNotFinite));
  const __m256i root_not = _mm256_set1_epi8(static_cast<char>(RootCode::kNotFinite));
  __mmask32 found = 0;
  for (int64_t i = 0; i < n; i += kGroup) {
    const __m256i mean = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(means + i));
    const __m256i root = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(roots + i));
    found |= _mm256_cmpeq_epi8_mask(mean, mean_not) | _mm256_cmpeq_epi8_mask(root, root_not);
  }
  return found == 0;
}

// The largest of 32 words each.
inline void find_largest(__m512i a0, __m512i a1, __m512i b0, __m512i b1, uint32_t& a, uint32_t& b) {
  const __m512i a16 = _mm512_max_epu32(a0, a1), b16 = _mm512_max_epu32(b0, b1);
  // In each half eight words of one of them, then four, and so on.
  const __m512i both8 =
      _mm512_max_epu32(_mm512_shuffle_i64x2(a16, b16, 0x44), _mm512_shuffle_i64x2(a16, b16, 0xee));
  const __m512i both4 = _mm512_max_epu32(both8, _mm512_shuffle_i64x2(both8, both8, 0xb1));
  const __m512i both2 = _mm512_max_epu32(both4, _mm512_bsrli_epi128(both4, 8));
  const __m512i both = _mm512_max_epu32(both2, _mm512_bsrli_epi128(both2, 4));
  a = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(both)));
  b = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_extracti32x4_epi32(both, 2)));
}

// The element loop of a tile whose codes are all finite.
template <class Rule, bool kDecays>
void update_groups(float* __restrict param, const float* __restrict grad, const int8_t* __restrict mean_codes,
                   const uint8_t* __restrict root_codes, const uint8_t* __restrict mean_scales,
                   const uint8_t* __restrict root_scales, const Record<Rule, float>& record, int64_t n,
                   ToEncode& __restrict out) {
  const auto scalars = repeated_each<typename Rule::template Scalars<Floats>>(record.scalars);
  const auto of_grad = repeated_each<GradTransform<Floats>>(record.grad);
  for (int64_t g = 0; g < n / kGroup; ++g) {
    const Floats mean_power = repeated(power_of_two(mean_scales[g]) * MeanCode::kUnit);
    const Floats root_power = repeated(power_of_two(root_scales[g]) * RootCode::kUnit);
    Floats mean[2], root[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t i = g * kGroup + half * kFloats;
      const Floats of_mean = load_codes(mean_codes + i), of_root = load_codes(root_codes + i);
      const Floats decoded = of_root * of_root * root_power;
      Floats state[2] = {of_mean * absolute(of_mean) * mean_power, decoded * decoded};
      Floats value = load_floats(param + i);
      Floats slope = clamp(of_grad.scale * load_floats(grad + i), of_grad.min, of_grad.max);
      if constexpr (kDecays) slope = slope + of_grad.weight_decay * value;
      Rule::update(value, slope, state, scalars);
      store_floats(param + i, value);
      mean[half] = state[0];
      root[half] = square_root(state[1]);
      store_floats(out.means + i, mean[half]);
      store_floats(out.roots + i, root[half]);
    }
    // A root has a sign where it is NaN, or -0, and then counts as too large.
    find_largest(words_of(absolute(mean[0])), words_of(absolute(mean[1])), words_of(root[0]),
                 words_of(root[1]), out.most_mean[g], out.most_root[g]);
  }
}

inline __m512i mix(__m512i word) {
  word = _mm512_xor_si512(word, _mm512_srli_epi32(word, 16));
  word = _mm512_mullo_epi32(word, repeated_word(0x7feb352du));
  word = _mm512_xor_si512(word, _mm512_srli_epi32(word, 15));
  word = _mm512_mullo_epi32(word, repeated_word(0x846ca68bu));
  return _mm512_xor_si512(word, _mm512_srli_epi32(word, 16));
}

// Code::random of sixteen words; 0xea: of three words, the first and the second, or the third.
inline __m512i random_of(MeanCode, __m512i words) {
  return _mm512_ternarylogic_epi32(words, repeated_word(0xff00u), repeated_word(0x80u), 0xea);
}
inline __m512i random_of(RootCode, __m512i words) {
  const __m512i upper = _mm512_srli_epi32(words, 16);
  return _mm512_ternarylogic_epi32(upper, repeated_word(0xfffcu), repeated_word(2), 0xea);
}

// The magnitudes of codes, in units of 2^-16: see encode_root.
template <class Code>
__m512i encode_sum(Floats value, float inverse, __m512i words) {
  const Floats root = square_root(absolute(value) * repeated(inverse));
  Floats y = root * repeated(static_cast<float>(Code::kLevels) * 65536.0f);
  if constexpr (Code::kFloor > 0) {
    const __mmask16 is_not_0 = _mm512_test_epi32_mask(words_of(value), repeated_word(0x7fffffffu));
    const Floats least = repeated(static_cast<float>(Code::kFloor) * 65536.0f);
    y.lanes = _mm512_maskz_max_ps(is_not_0, y.lanes, least.lanes);
  }
  return _mm512_add_epi32(_mm512_cvttps_epi32(y.lanes), random_of(Code{}, words));
}

// The upper halves of 32 sums, as bytes.
inline __m256i upper_halves(__m512i first, __m512i second) {
  alignas(64) static constexpr uint16_t kUpper[kGroup] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                          23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                          45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_cvtepi16_epi8(_mm512_permutex2var_epi16(first, _mm512_load_si512(kUpper), second));
}

// The codes and exponents of a tile. False, and nothing is written, where a number is not finite or exceeds
// the largest power of two that its group may have. first: the word of the first element, before it is mixed;
// words: room for the words, or null where nobody asks for them.
inline bool encode_groups(const ToEncode& __restrict in, int8_t* __restrict mean_codes,
                          uint8_t* __restrict root_codes, uint8_t* __restrict mean_scales,
                          uint8_t* __restrict root_scales, uint32_t* __restrict words, int64_t n,
                          uint32_t first) {
  const int64_t groups = n / kGroup;
  uint32_t mean_most = 0, root_most = 0;
  for (int64_t g = 0; g < groups; ++g) {
    mean_most = in.most_mean[g] > mean_most ? in.most_mean[g] : mean_most;
    root_most = in.most_root[g] > root_most ? in.most_root[g] : root_most;
  }
  if (mean_most > static_cast<uint32_t>(MeanCode::kMost) << 23) return false;
  if (root_most > static_cast<uint32_t>(RootCode::kMost) << 23) return false;
  float mean_inverses[kTile / kGroup], root_inverses[kTile / kGroup];
  exponents_of_groups<MeanCode>(in.most_mean, mean_scales, mean_inverses, groups);
  exponents_of_groups<RootCode>(in.most_root, root_scales, root_inverses, groups);

  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i word =
      _mm512_add_epi32(repeated_word(first), _mm512_mullo_epi32(places, repeated_word(kPlaceStride)));
  for (int64_t g = 0; g < groups; ++g) {
    __m512i mean[2], root[2];
    __mmask32 negative = 0;
    for (int half = 0; half < 2; ++half) {
      const int64_t i = g * kGroup + half * kFloats;
      const __m512i mixed = mix(word);
      word = _mm512_add_epi32(word, repeated_word(kPlaceStride * kFloats));
      if (words != nullptr) _mm512_storeu_si512(words + i, mixed);
      const Floats value = load_floats(in.means + i);
      mean[half] = encode_sum<MeanCode>(value, mean_inverses[g], mixed);
      root[half] = encode_sum<RootCode>(load_floats(in.roots + i), root_inverses[g], mixed);
      negative |= static_cast<__mmask32>(_mm512_movepi32_mask(words_of(value))) << half * kFloats;
    }
    const __m256i magnitudes = upper_halves(mean[0], mean[1]);
    const __m256i signed_codes =
        _mm256_mask_sub_epi8(magnitudes, negative, _mm256_setzero_si256(), magnitudes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mean_codes + g * kGroup), signed_codes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(root_codes + g * kGroup), upper_halves(root[0], root[1]));
  }
  return true;
}

}  // namespace
}  // namespace fused_optim

#endif
