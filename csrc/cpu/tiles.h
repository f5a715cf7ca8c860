// Tiles of a row's columns for the element loops: widened into scratch, and rounded back. Part of
// kernels.cpp.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "codec.h"

namespace fused_optim {
namespace {

// Elements of a tile. Scratch tiles lie an odd number of cache lines apart: a power of two would put them
// all, and page-aligned tensors with them, into the same few sets of the first-level cache (half the speed,
// measured).
constexpr int64_t kTile = 512;
constexpr int64_t kScratch = kTile + 48;

template <class Storage, class T>
void widen(const Storage* in, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(load(in[i]));
}

template <class Storage, class T>
void narrow(const T* __restrict in, Storage* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(out[i], static_cast<float>(in[i]));
}

#if defined(__F16C__)
// The processor's own conversions: the compiler does not find them, and the portable ones take three times as
// long.
void widen(const float16* in, float* __restrict out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  }
#endif
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (; i < n; ++i) out[i] = load(in[i]);
}

void narrow(const float* __restrict in, float16* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i rounded =
        _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), rounded);
  }
#endif
  for (; i + 8 <= n; i += 8) {
    const __m128i rounded =
        _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), rounded);
  }
  for (; i < n; ++i) store(out[i], in[i]);
}
#endif

// Calls f(upper_key, first, count) for pieces of n elements from `begin` on whose places in the whole tensor
// have the same upper half: for one, but where the place passes a multiple of 2^32.
template <class F>
void for_each_upper(const Row& row, uint32_t key, int64_t begin, int64_t n, const F& f) {
  for (int64_t i = 0; i < n;) {
    const int64_t place = row.first + begin + i;
    const int64_t left = (int64_t{1} << 32) - static_cast<uint32_t>(place);
    const int64_t most = left < (int64_t{1} << 30) ? left : int64_t{1} << 30;
    const int64_t count = n - i < most ? n - i : most;
    f(upper_key(key, place), i, count);
    i += count;
  }
}

// The random words of a tile of a row whose first element is at `begin`.
inline void draw_words(const Row& row, uint32_t key, int64_t begin, int64_t n, uint32_t* words) {
  for_each_upper(row, key, begin, n, [&](uint32_t of_upper, int64_t at, int64_t count) {
    const auto lower = static_cast<uint32_t>(row.first + begin + at);
    uint32_t* __restrict out = words + at;
    uint32_t word = lower * kPlaceStride + of_upper;  // random_word, by a sum for each element
    for (int32_t k = 0; k < static_cast<int32_t>(count); ++k, word += kPlaceStride) out[k] = mix(word);
  });
}

// The exponents of the groups of a state's codes from element `begin` on.
inline uint8_t* scales_of(const Row& row, int index, int64_t begin) {
  return reinterpret_cast<uint8_t*>(row.scale[index - kFirstState]) + begin / kGroup;
}

// A number of each group, for each of its elements. A loop over the tile then knows nothing of groups, and
// has vectors twice as wide: of 32 bytes the compiler makes no vector of 64.
inline void repeat_for_groups(const float* __restrict of_groups, float* __restrict out, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    for (int k = 0; k < kGroup; ++k) out[g * kGroup + k] = of_groups[g];
  }
}

// The powers of two of a tile's groups times `unit`, for each element.
inline void powers_of_tile(const uint8_t* __restrict scales, float unit, float* __restrict out, int64_t n) {
  float of_groups[kTile / kGroup];
  for (int64_t g = 0; g < n / kGroup; ++g) of_groups[g] = power_of_two(scales[g]) * unit;
  repeat_for_groups(of_groups, out, n / kGroup);
}

template <class Codes, class T>
void decode_tile(const Codes* __restrict codes, const uint8_t* __restrict scales, T* __restrict out,
                 int64_t n) {
  alignas(64) float powers[kTile];
  powers_of_tile(scales, 1, powers, n);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(decode(codes[i], powers[i]));
}

// The codes of a tile as numbers, before they are decoded.
template <class Codes>
void widen_codes(const Codes* __restrict codes, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(codes[i]);
}

inline float absolute(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

// The largest magnitude_bits of each group.
inline void largest_of_groups(const float* __restrict x, int32_t* __restrict most, int64_t n) {
  for (int64_t g = 0; g < n / kGroup; ++g) {
    int32_t largest = 0;
    for (int k = 0; k < kGroup; ++k) {
      const int32_t bits = magnitude_bits(x[g * kGroup + k]);
      largest = bits > largest ? bits : largest;
    }
    most[g] = largest;
  }
}

// Of a group some of whose values are not finite, one by one.
template <class Code>
void encode_odd_group(const float* x, typename Code::Storage* codes, uint8_t* scale, const uint32_t* words) {
  int32_t most = 0;
  for (int k = 0; k < kGroup; ++k) {
    const int32_t bits = finite_bits(x[k]);
    most = bits > most ? bits : most;
  }
  const int32_t exponent = group_exponent<Code>(most);
  *scale = static_cast<uint8_t>(exponent);
  for (int k = 0; k < kGroup; ++k) {
    codes[k] = static_cast<typename Code::Storage>(
        encode<Code>(x[k], absolute(x[k]), power_of_two(254 - exponent), words[k]));
  }
}

// Of a tile: the first state and the root of the second, as they will be encoded, and the largest magnitude
// of each group, as bits.
struct ToEncode {
  alignas(64) float means[kScratch], roots[kScratch];
  uint32_t most_mean[kTile / kGroup], most_root[kTile / kGroup];
};

// The exponents of groups from the largest finite_bits of each, and the inverses of their powers of two.
template <class Code, class Bits>
void exponents_of_groups(const Bits* __restrict most, uint8_t* __restrict scales, float* __restrict inverses,
                         int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t exponent = group_exponent<Code>(static_cast<int32_t>(most[g]));
    inverses[g] = power_of_two(254 - exponent);
    scales[g] = static_cast<uint8_t>(exponent);
  }
}

// The codes of a tile. x: of MeanCode the values, of RootCode their roots. One loop after the other, so that
// no group waits for another. kDraws: the words are drawn here, from `first` on, the first one before it is
// mixed, and left in `words`.
template <class Code, bool kDraws = false>
void encode_tile(const float* __restrict x, typename Code::Storage* __restrict codes,
                 uint8_t* __restrict scales, uint32_t* __restrict words, int64_t n, uint32_t first = 0) {
  const int64_t groups = n / kGroup;
  int32_t most[kTile / kGroup], largest = 0;
  float of_groups[kTile / kGroup];
  alignas(64) float inverses[kTile];
  largest_of_groups(x, most, n);
  for (int64_t g = 0; g < groups; ++g) largest = most[g] > largest ? most[g] : largest;
  exponents_of_groups<Code>(most, scales, of_groups, groups);
  uint32_t word = first;
  if (largest >= kNotFiniteBits) {
    for (int64_t i = 0; kDraws && i < n; ++i, word += kPlaceStride) words[i] = mix(word);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t i = g * kGroup;
      encode_odd_group<Code>(x + i, codes + i, scales + g, words + i);
    }
    return;
  }
  repeat_for_groups(of_groups, inverses, groups);
  for (int32_t i = 0; i < static_cast<int32_t>(n); ++i, word += kPlaceStride) {
    if constexpr (kDraws) words[i] = mix(word);
    const int32_t code = encode_finite<Code>(x[i], absolute(x[i]), inverses[i], words[i]);
    codes[i] = static_cast<typename Code::Storage>(code);
  }
}

inline float number_to_encode(MeanCode, float value) { return value; }
inline float number_to_encode(RootCode, float value) { return RootCode::magnitude(value); }

// The codes of a tile's values.
template <class Code, class T>
void encode_values(const T* __restrict in, typename Code::Storage* __restrict codes,
                   uint8_t* __restrict scales, uint32_t* __restrict words, int64_t n) {
  alignas(64) float x[kTile];
  for (int64_t i = 0; i < n; ++i) x[i] = number_to_encode(Code{}, static_cast<float>(in[i]));
  encode_tile<Code>(x, codes, scales, words, n);
}

template <class Storage, class T>
void narrow_stochastically(const T* __restrict in, Storage* __restrict out, const uint32_t* __restrict words,
                           int64_t n) {
  for (int64_t i = 0; i < n; ++i) store_stochastically(out[i], static_cast<float>(in[i]), words[i]);
}

// The tile of a column as T: the memory itself, or a widened copy in scratch.
template <class T>
T* load_tile(const Row& row, int index, int64_t begin, int64_t n, T* scratch) {
  switch (row.dtype[index]) {
    case DType::float32:
      if constexpr (sizeof(T) == 4) return column<float>(row, index) + begin;
      widen(column<float>(row, index) + begin, scratch, n);
      return scratch;
    case DType::float64:
      if constexpr (sizeof(T) == 8) return column<double>(row, index) + begin;
      widen(column<double>(row, index) + begin, scratch, n);
      return scratch;
    case DType::bfloat16:
      widen(column<bfloat16>(row, index) + begin, scratch, n);
      return scratch;
    case DType::float16:
      widen(column<float16>(row, index) + begin, scratch, n);
      return scratch;
    case DType::none:
    case DType::remainder:
    case DType::int8:
    case DType::uint8:
      break;
  }
  return scratch;
}

// Rounds a scratch tile back to its column; nothing to do where the tile was the memory itself. words: of the
// tile, where the row draws.
template <class T>
void store_tile(const Row& row, int index, int64_t begin, int64_t n, const T* tile, const uint32_t* words) {
  switch (row.dtype[index]) {
    case DType::float32:
      if constexpr (sizeof(T) == 8) narrow(tile, column<float>(row, index) + begin, n);
      break;
    case DType::bfloat16:
      if (row.stochastic) {
        narrow_stochastically(tile, column<bfloat16>(row, index) + begin, words, n);
      } else {
        narrow(tile, column<bfloat16>(row, index) + begin, n);
      }
      break;
    case DType::float16:
      if (row.stochastic) {
        narrow_stochastically(tile, column<float16>(row, index) + begin, words, n);
      } else {
        narrow(tile, column<float16>(row, index) + begin, n);
      }
      break;
    case DType::float64:
    case DType::none:
    case DType::remainder:
    case DType::int8:
    case DType::uint8:
      break;
  }
}

// Where a tile of a column is written that nobody reads before: the memory itself, or scratch.
template <class T>
T* room_for_tile(const Row& row, int index, int64_t begin, T* scratch) {
  const bool in_place = row.dtype[index] == (sizeof(T) == 8 ? DType::float64 : DType::float32);
  return in_place ? column<T>(row, index) + begin : scratch;
}

// A direction is rounded to nearest, whatever the row's states are; which dtypes it has: `kept_dtype` in
// fused_optim/rule/orthogonal.py.
template <class T>
void store_direction_tile(const Row& row, int index, int64_t begin, int64_t n, const T* tile) {
  switch (row.dtype[index]) {
    case DType::float32:
      if constexpr (sizeof(T) == 8) narrow(tile, column<float>(row, index) + begin, n);
      break;
    case DType::bfloat16:
      narrow(tile, column<bfloat16>(row, index) + begin, n);
      break;
    case DType::float64:
    case DType::float16:
    case DType::none:
    case DType::remainder:
    case DType::int8:
    case DType::uint8:
      break;
  }
}

// The same for the columns of states, which may be codes.
template <class T>
T* load_state_tile(const Row& row, int index, int64_t begin, int64_t n, T* scratch) {
  const DType dtype = row.dtype[index];
  if (!is_byte(dtype)) return load_tile<T>(row, index, begin, n, scratch);
  const uint8_t* scales = scales_of(row, index, begin);
  if (dtype == DType::int8) {
    decode_tile(column<int8_t>(row, index) + begin, scales, scratch, n);
  } else {
    decode_tile(column<uint8_t>(row, index) + begin, scales, scratch, n);
  }
  return scratch;
}

template <class T>
void store_state_tile(const Row& row, int index, int64_t begin, int64_t n, const T* tile, uint32_t* words,
                      const float* roots = nullptr) {
  const DType dtype = row.dtype[index];
  if (!is_byte(dtype)) return store_tile<T>(row, index, begin, n, tile, words);
  uint8_t* scales = scales_of(row, index, begin);
  if (dtype == DType::int8) {
    encode_values<MeanCode>(tile, column<int8_t>(row, index) + begin, scales, words, n);
  } else if (roots != nullptr) {
    encode_tile<RootCode>(roots, column<uint8_t>(row, index) + begin, scales, words, n);
  } else {
    encode_values<RootCode>(tile, column<uint8_t>(row, index) + begin, scales, words, n);
  }
}

template <class Param>
bool all_round_to(const Param* param, const float* master, int64_t n) {
  int differ = 0;
  for (int64_t i = 0; i < n; ++i) differ |= !rounds_to(param[i], master[i]);
  return differ == 0;
}

#if defined(__F16C__)
bool all_round_to(const float16* param, const float* master, int64_t n) {
  float16 rounded[kTile];
  narrow(master, rounded, n);
  int differ = 0;
  for (int64_t i = 0; i < n; ++i) differ |= rounded[i].bits ^ param[i].bits;
  return differ == 0;
}
#endif

// A tile of a float32 master weight: the memory itself, or a copy in which each element that does not round
// to its parameter has been replaced by that.
template <class Param>
float* load_master_tile(const Row& row, int64_t begin, int64_t n, float* scratch) {
  const Param* param = column<Param>(row, kParam) + begin;
  float* master = column<float>(row, kMaster) + begin;
  if (all_round_to(param, master, n)) return master;
  for (int64_t i = 0; i < n; ++i) scratch[i] = load_master(param[i], master[i]);
  return scratch;
}

// The tile that a rule updates: the master weight where there is one, otherwise the parameter.
template <class T>
T* load_param(const Row& row, int64_t begin, int64_t n, T* scratch) {
  if constexpr (sizeof(T) == 4) {  // a float64 parameter has no master weight
    if (row.dtype[kMaster] == DType::remainder) {
      const bfloat16* param = column<bfloat16>(row, kParam) + begin;
      const int16_t* remainder = column<int16_t>(row, kMaster) + begin;
      for (int64_t i = 0; i < n; ++i) scratch[i] = load_split(param[i], remainder[i]);
      return scratch;
    }
    if (row.dtype[kMaster] == DType::int8) {
      const bfloat16* param = column<bfloat16>(row, kParam) + begin;
      const int8_t* remainder = column<int8_t>(row, kMaster) + begin;
      for (int64_t i = 0; i < n; ++i) scratch[i] = load_split8(param[i], remainder[i]);
      return scratch;
    }
    if (row.dtype[kMaster] == DType::float32) {
      return row.dtype[kParam] == DType::bfloat16 ? load_master_tile<bfloat16>(row, begin, n, scratch)
                                                  : load_master_tile<float16>(row, begin, n, scratch);
    }
  }
  return load_tile<T>(row, kParam, begin, n, scratch);
}

template <class Storage>
void narrow_ties_away(const float* __restrict in, Storage* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store_ties_away(out[i], in[i]);
}

inline void store_split8_tile(const float* __restrict in, bfloat16* __restrict param,
                              int8_t* __restrict remainder, const uint32_t* __restrict words, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store_split8(param[i], remainder[i], in[i], words[i]);
}

template <class T>
void store_param(const Row& row, int64_t begin, int64_t n, const T* tile, const uint32_t* words) {
  if constexpr (sizeof(T) == 4) {
    if (row.dtype[kMaster] == DType::remainder) {
      bfloat16* param = column<bfloat16>(row, kParam) + begin;
      int16_t* remainder = column<int16_t>(row, kMaster) + begin;
      for (int64_t i = 0; i < n; ++i) store_split(param[i], remainder[i], tile[i]);
      return;
    }
    if (row.dtype[kMaster] == DType::int8) {
      return store_split8_tile(tile, column<bfloat16>(row, kParam) + begin,
                               column<int8_t>(row, kMaster) + begin, words, n);
    }
    if (row.dtype[kMaster] == DType::float32) {
      float* master = column<float>(row, kMaster) + begin;
      if (tile != master) __builtin_memcpy(master, tile, static_cast<size_t>(n) * sizeof(float));
      if (row.dtype[kParam] == DType::bfloat16) {
        narrow_ties_away(tile, column<bfloat16>(row, kParam) + begin, n);
      } else {
        narrow_ties_away(tile, column<float16>(row, kParam) + begin, n);
      }
      return;
    }
  }
  store_tile<T>(row, kParam, begin, n, tile, words);
}

// Asks for the next tile of every column of 16 bits or 8 while this one is computed: the processor's
// prefetchers lose the thread where a row is walked in short runs of each column in turn. Wider columns are
// better off without (a quarter slower with it, measured).
void prefetch_tile(const Row& row, int64_t begin, int64_t end) {
  const int64_t last = begin + kTile < end ? begin + kTile : end;
  for (int c = 0; c < kColumns; ++c) {
    const int64_t size = size_of(row.dtype[c]);
    if (size != 1 && size != 2) continue;
    const char* base = column<const char>(row, c);
    for (int64_t byte = begin * size; byte < last * size; byte += 64) __builtin_prefetch(base + byte, 1);
  }
}

// Asks for the next tile of a column whose neighbours are in the cache: it is then the only one to wait for,
// and the processor's prefetchers do not run far enough ahead of it.
void prefetch_column(const Row& row, int index, int64_t begin, int64_t end) {
  const int64_t last = begin + kTile < end ? begin + kTile : end;
  const int64_t size = size_of(row.dtype[index]);
  const char* base = column<const char>(row, index);
  for (int64_t byte = begin * size; byte < last * size; byte += 64) __builtin_prefetch(base + byte, 0, 2);
}

}  // namespace
}  // namespace fused_optim
