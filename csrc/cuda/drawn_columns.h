// Columns of rows that draw random words, element by element, whatever their storages are: a state may be
// codes, a master weight a remainder of 8 bits.
//
// Such rows have code of their own for what is usual (storages.h). This serves all else, and what lies at the
// ragged end of a row or is out of the ordinary, so it is made to be small: conversions are functions, of
// which a module has one each, and not a copy for every column of every kernel.
#pragma once

#include "cuda/columns.h"

#if defined(__CUDACC__)
#define FO_SHARED_CODE static __device__ __noinline__
#else
#define FO_SHARED_CODE static inline
#endif

namespace fused_optim {

// A number, or the code of one in a group of this exponent.
FO_SHARED_CODE float widen_stored(uint32_t bits, int32_t exponent, DType dtype) {
  const auto half = static_cast<uint16_t>(bits);
  if (dtype == DType::bfloat16) return load(bfloat16{half});
  if (dtype == DType::float16) return load(float16{half});
  if (dtype == DType::int8) return decode(static_cast<int8_t>(bits), power_of_two(exponent));
  if (dtype == DType::uint8) return decode(static_cast<uint8_t>(bits), power_of_two(exponent));
  return float_of(bits);
}

FO_SHARED_CODE uint32_t narrow_number(float value, DType dtype, AnyWord word) {
  bfloat16 wide;
  float16 precise;
  if (word.stochastic) {
    store_stochastically(wide, value, word.bits);
    store_stochastically(precise, value, word.bits);
  } else {
    store(wide, value);
    store(precise, value);
  }
  return dtype == DType::bfloat16 ? wide.bits : dtype == DType::float16 ? precise.bits : bits_of(value);
}

// The code of one element of a group, and the group's exponent above it. A group is an element of each lane
// of a warp; all of them are here, since rows of codes have whole groups.
FO_SHARED_CODE uint32_t narrow_to_code(float value, DType dtype, AnyWord word) {
  static_assert(kGroup == 32, "a group is an element of each lane");
  const bool means = dtype == DType::int8;
  const float magnitude = means ? MeanCode::magnitude(value) : RootCode::magnitude(value);
  const int32_t most = largest_of_lanes<kGroup>(finite_bits(magnitude));
  const int32_t exponent = means ? group_exponent<MeanCode>(most) : group_exponent<RootCode>(most);
  const float root = square_root(magnitude * power_of_two(254 - exponent));
  int32_t code = means ? encode_root<MeanCode>(value, magnitude, root, word.bits)
                       : encode_root<RootCode>(value, magnitude, root, word.bits);
  if (magnitude_bits(magnitude) >= kNotFiniteBits) code = means ? MeanCode::kNotFinite : RootCode::kNotFinite;
  return (static_cast<uint32_t>(code) & 0xffu) | static_cast<uint32_t>(exponent) << 8;
}

struct ParamBits {
  uint32_t param, master;
};

FO_SHARED_CODE float widen_param(ParamBits bits, DType param, DType master) {
  const auto half = static_cast<uint16_t>(bits.param);
  if (master == DType::int8) return load_split8(bfloat16{half}, static_cast<int8_t>(bits.master));
  if (master == DType::remainder) return load_split(bfloat16{half}, static_cast<int16_t>(bits.master));
  if (master == DType::none) return widen_stored(bits.param, 0, param);
  const float whole = float_of(bits.master);
  return param == DType::bfloat16 ? load_master(bfloat16{half}, whole) : load_master(float16{half}, whole);
}

FO_SHARED_CODE ParamBits narrow_param(float value, DType param, DType master, AnyWord word) {
  if (master == DType::none) return {narrow_number(value, param, word), 0};
  bfloat16 rounded;
  if (master == DType::int8) {
    int8_t remainder;
    store_split8(rounded, remainder, value, word.bits);
    return {rounded.bits, static_cast<uint8_t>(remainder)};
  }
  if (master == DType::remainder) {
    int16_t remainder;
    store_split(rounded, remainder, value);
    return {rounded.bits, static_cast<uint16_t>(remainder)};
  }
  if (param == DType::float16) return {narrow_number(value, param, word.to_nearest()), bits_of(value)};
  store_ties_away(rounded, value);
  return {rounded.bits, bits_of(value)};
}

template <class T>
using DrawnColumn = StoredColumn<T, true>;

// The parameter as a rule sees it: itself, or with what is beside it.
template <class T>
struct DrawnParamColumns {
  static constexpr int kColumns = 2;
  using Bits = typename DrawnColumn<T>::Bits;
  template <int N>
  struct Loaded {
    Bits param, master;
  };
  DrawnColumn<T> param, master;

  FO_DEVICE DrawnParamColumns(const Row& row, int index, int64_t begin)
      : param(row, index, begin), master(row, kMaster, begin) {}
  template <int N>
  FO_DEVICE Loaded<N> fetch(int i, int plus) const {
    static_assert(N == 1, "an element");
    return {param.fetch_bits(i + plus), master.fetch_bits(i + plus)};
  }
  FO_DEVICE void widen(const Loaded<1>& loaded, T (&out)[1]) const {
    if constexpr (sizeof(T) == 8) {  // a float64 parameter has no master weight
      __builtin_memcpy(out, &loaded.param, sizeof out);
    } else {
      out[0] = widen_param({loaded.param, loaded.master}, param.dtype, master.dtype);
    }
  }
  FO_DEVICE void narrow(const T (&values)[1], Loaded<1>& out, AnyWord word) const {
    if constexpr (sizeof(T) == 8) {
      __builtin_memcpy(&out.param, values, sizeof values);
    } else {
      const ParamBits bits = narrow_param(values[0], param.dtype, master.dtype, word);
      out = {bits.param, bits.master};
    }
  }
  template <int N>
  FO_DEVICE void put(int i, int plus, const Loaded<N>& out) const {
    master.put_bits(i + plus, out.master);
    param.put_bits(i + plus, out.param);
  }
};

// A state, codes or numbers.
template <class T>
struct DrawnState {
  template <int N>
  struct Loaded {
    typename DrawnColumn<T>::Bits bits;
    uint32_t exponent;  // of the group, where it is codes
  };
  DrawnColumn<T> column;
  uint64_t scale;

  FO_DEVICE DrawnState(const Row& row, int index, int64_t begin)
      : column(row, index, begin), scale(scales_at(row, index, begin)) {}

  template <int N>
  FO_DEVICE Loaded<N> fetch(int i, int plus) const {
    static_assert(N == 1, "an element");
    Loaded<N> loaded{column.fetch_bits(i + plus), 0};
    if (is_byte(column.dtype)) loaded.exponent = load_global<Reuse::none, uint8_t>(exponent_at(i + plus));
    return loaded;
  }
  FO_DEVICE void widen(const Loaded<1>& loaded, T (&out)[1]) const {
    if constexpr (sizeof(T) == 8) {
      if (column.dtype == DType::float64) {
        __builtin_memcpy(out, &loaded.bits, sizeof out);
        return;
      }
    }
    out[0] = static_cast<T>(widen_stored(static_cast<uint32_t>(loaded.bits),
                                         static_cast<int32_t>(loaded.exponent), column.dtype));
  }
  FO_DEVICE static bool is_not_sure(const T (&)[1], const Loaded<1>&) { return false; }
  FO_DEVICE void narrow(const T (&values)[1], Loaded<1>& out, AnyWord word) const {
    if constexpr (sizeof(T) == 8) {
      if (column.dtype == DType::float64) {
        __builtin_memcpy(&out.bits, values, sizeof values);
        return;
      }
    }
    const auto value = static_cast<float>(values[0]);
    if (is_byte(column.dtype)) {
      const uint32_t code = narrow_to_code(value, column.dtype, word);
      out = {code & 0xffu, code >> 8};
    } else {
      out.bits = narrow_number(value, column.dtype, word);
    }
  }
  template <int N>
  FO_DEVICE void put(int i, int plus, const Loaded<N>& out) const {
    column.put_bits(i + plus, out.bits);
    if (is_byte(column.dtype) && (i + plus) % kGroup == 0)
      store_global<Reuse::none>(exponent_at(i + plus), static_cast<uint8_t>(out.exponent));
  }

 private:
  FO_DEVICE uint8_t* exponent_at(int i) const { return reinterpret_cast<uint8_t*>(scale) + i / kGroup; }
};

}  // namespace fused_optim
