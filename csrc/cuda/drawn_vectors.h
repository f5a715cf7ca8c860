// Columns of rows that draw random words, a vector at a time, as QuickFloats.
#pragma once

#include "cuda/columns.h"
#include "cuda/quick_codec.h"

namespace fused_optim {

struct WordsOfFour {
  uint32_t bits[4];
};

// Of a tile whose places in the whole tensor have the same upper half.
struct VectorWords {
  uint32_t first;  // before it is mixed: of the tile's first element

  FO_DEVICE VectorWords(const Row& row, uint32_t key, int64_t begin)
      : first(static_cast<uint32_t>(row.first + begin) * kPlaceStride + upper_key(key, row.first + begin)) {}
  FO_DEVICE WordsOfFour of_four(int i) const {
    WordsOfFour words;
    const uint32_t own = first + static_cast<uint32_t>(i) * kPlaceStride;
#pragma unroll
    for (int e = 0; e < 4; ++e) words.bits[e] = mix(own + static_cast<uint32_t>(e) * kPlaceStride);
    return words;
  }
};

// A column of numbers: rounded to nearest, or in bfloat16 by words.
template <class Column, bool kStochastic>
struct RoundedColumn : Column {
  using Column::Column;

  template <int N>
  FO_DEVICE void find_exponent(const QuickFloat (&)[N], const typename Column::template Loaded<N>&) const {}
  template <int N>
  FO_DEVICE void narrow_four(int e, const QuickFloat (&values)[N], typename Column::template Loaded<N>& out,
                             const WordsOfFour& words) const {
    if constexpr (kStochastic && Column::template Loaded<N>::kPairs) {
      out.word[e / 2] = pack_stochastically(values + e, words.bits);
      out.word[e / 2 + 1] = pack_stochastically(values + e + 2, words.bits + 2);
    } else if (e == 0) {
      this->narrow(values, out);
    }
  }
};

// A parameter of bfloat16 beside a remainder of 8 bits.
template <Reuse kReuse>
struct Split8Columns : MasterColumns<bfloat16, int8_t, kReuse> {
  using Columns = MasterColumns<bfloat16, int8_t, kReuse>;
  using Columns::Columns;

  template <int N>
  FO_DEVICE void widen(const typename Columns::template Loaded<N>& loaded, QuickFloat (&out)[N]) const {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      float whole[4];
      load_split8(loaded.param.word + k / 2, loaded.master.word[k / 4], whole);
#pragma unroll
      for (int e = 0; e < 4; ++e) out[k + e] = whole[e];
    }
  }
  template <int N>
  FO_DEVICE void narrow_four(int e, const QuickFloat (&values)[N], typename Columns::template Loaded<N>& out,
                             const WordsOfFour& words) const {
    store_split8(values + e, words.bits, out.param.word + e / 2, out.master.word[e / 4]);
  }
};

// A state as codes: of roots the rule's second, of means all others. A group is in the vectors of some lanes
// side by side.
struct CodeColumn {
  template <int N>
  struct Loaded {
    Vector<uint8_t, N> codes;
    uint32_t exponent;  // of the group, and kNotSure where encoding is not
  };
  static constexpr uint32_t kNotSure = 256;
  FixedColumn<uint8_t, Reuse::none> codes;
  uint64_t scale;
  bool roots = false;

  FO_DEVICE CodeColumn(const Row& row, int index, int64_t begin)
      : codes(row, index, begin), scale(scales_at(row, index, begin)) {}

  template <int N>
  FO_DEVICE Loaded<N> fetch(int i, int plus) const {
    return {codes.template fetch<N>(i, plus), load_global<Reuse::none, uint8_t>(exponent_at(i, plus))};
  }
  template <int N>
  FO_DEVICE void widen(const Loaded<N>& loaded, QuickFloat (&out)[N]) const {
    if (roots) {
      widen_as<QuickRoots>(loaded, out);
    } else {
      widen_as<QuickMeans>(loaded, out);
    }
  }
  template <int N>
  FO_DEVICE void find_exponent(const QuickFloat (&values)[N], Loaded<N>& out) const {
    if (roots) {
      find_exponent_as<QuickRoots>(values, out);
    } else {
      find_exponent_as<QuickMeans>(values, out);
    }
  }
  template <int N>
  FO_DEVICE void narrow_four(int e, const QuickFloat (&values)[N], Loaded<N>& out,
                             const WordsOfFour& words) const {
    const float inverse = power_of_two(254 - static_cast<int32_t>(out.exponent & 255u));
    out.codes.word[e / 4] = roots ? QuickRoots::encode(values + e, inverse, words.bits)
                                  : QuickMeans::encode(values + e, inverse, words.bits);
  }
  template <int N>
  FO_DEVICE static bool is_not_sure(const QuickFloat (&)[N], const Loaded<N>& out) {
    return out.exponent >= kNotSure;
  }
  template <int N>
  FO_DEVICE void put(int i, int plus, const Loaded<N>& out) const {
    codes.template put<N>(i, plus, out.codes);
    if ((i + plus) % kGroup == 0)
      store_global<Reuse::none>(exponent_at(i, plus), static_cast<uint8_t>(out.exponent));
  }

 private:
  FO_DEVICE uint8_t* exponent_at(int i, int plus) const {
    return reinterpret_cast<uint8_t*>(scale + static_cast<uint32_t>(i) / kGroup) + plus / kGroup;
  }

  // A NaN where the codes of some element are none of a number.
  template <class Quick, int N>
  FO_DEVICE static void widen_as(const Loaded<N>& loaded, QuickFloat (&out)[N]) {
    float of_group;
    bool sure = quick_scale<Quick>(static_cast<int32_t>(loaded.exponent), of_group);
    uint32_t not_finite = 0;
#pragma unroll
    for (int w = 0; w < N / 4; ++w) {
      not_finite |= Quick::not_finite(loaded.codes.word[w]);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[4 * w + k] = Quick::decode(loaded.codes.word[w], k, of_group);
    }
    sure = sure && not_finite == 0;
    out[0] = sure ? out[0].value : float_of(0x7fffffffu);
  }

  template <class Quick, int N>
  FO_DEVICE static void find_exponent_as(const QuickFloat (&values)[N], Loaded<N>& out) {
    float largest = Quick::for_largest(values[0]);
#pragma unroll
    for (int e = 1; e < N; ++e) largest = quick_maximum(largest, Quick::for_largest(values[e]));
    // As integers: a NaN is the largest then.
    const auto of_lanes = largest_of_lanes<kGroup / N>(static_cast<int32_t>(bits_of(largest)));
    int32_t exponent;
    const bool sure =
        quick_exponent<Quick>(Quick::magnitude_of(float_of(static_cast<uint32_t>(of_lanes))), exponent);
    out.exponent = static_cast<uint32_t>(exponent) | (sure ? 0 : kNotSure);
  }
};

}  // namespace fused_optim
