// Which combinations of storages have code of their own in the element updates: the table, and the row's side
// of it.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cuda/drawn_columns.h"
#include "cuda/drawn_vectors.h"

namespace fused_optim {

template <DType kDType>
struct StorageOf;
template <>
struct StorageOf<DType::float32> {
  using type = float;
};
template <>
struct StorageOf<DType::bfloat16> {
  using type = bfloat16;
};
template <>
struct StorageOf<DType::float16> {
  using type = float16;
};
template <>
struct StorageOf<DType::float64> {
  using type = double;
};
template <>
struct StorageOf<DType::remainder> {
  using type = int16_t;
};
template <>
struct StorageOf<DType::int8> {
  using type = int8_t;
};
template <>
struct StorageOf<DType::none> {
  using type = float;  // of a column that is never asked for
};

constexpr uint64_t number_of(DType dtype, int column) { return static_cast<uint64_t>(dtype) << 8 * column; }

// The storages of a row's param, grad, master weight and states with a number an element, a byte each; and 0
// for a row without a gradient. One load, and one comparison with what a layout has.
FO_DEVICE uint64_t storages_of(const Row& row, int first_state, int states) {
  uint64_t word;
  __builtin_memcpy(&word, __builtin_assume_aligned(row.dtype, sizeof word), sizeof word);
  if (word >> 8 * kColumns == 0) return 0;
  const uint64_t before = word & ((uint64_t{1} << 8 * kFirstState) - 1);
  const uint64_t of_states = word >> 8 * first_state & ((uint64_t{1} << 8 * states) - 1);
  return before | of_states << 8 * kFirstState;
}

constexpr int widest(std::initializer_list<DType> columns) {
  int bytes = 0;
  for (const DType dtype : columns) bytes = size_of(dtype) > bytes ? size_of(dtype) : bytes;
  return bytes;
}

// One combination of storages. A vector has the elements of 16 bytes of the widest column. A narrower column
// moves the same elements in 8 bytes: 16 would leave every other half sector of the wide columns to a second
// access.
template <DType kParamType, DType kGradType, DType kMasterType, DType kStateType>
struct Layout {
  using Words = NoWords;
  static constexpr bool kDraws = false, kCodes = false;
  static constexpr int kWidest = widest({kParamType, kGradType, kMasterType, kStateType});
  static constexpr int kVector = 16 / kWidest;
  static constexpr int kParamBytes = size_of(kParamType) + size_of(kMasterType);
  static constexpr int kGradBytes = size_of(kGradType);
  static constexpr int kStateBytes = size_of(kStateType);
  using ParamStorage = typename StorageOf<kParamType>::type;
  template <class T, Reuse kReuse>
  using Param = typename std::conditional<
      kMasterType == DType::none, ParamColumn<ParamStorage, kReuse>,
      MasterColumns<ParamStorage, typename StorageOf<kMasterType>::type, kReuse>>::type;
  template <class T>
  using Grad = FixedColumn<typename StorageOf<kGradType>::type, Reuse::none>;
  template <class T, Reuse kReuse>
  using State = FixedColumn<typename StorageOf<kStateType>::type, kReuse>;

  static constexpr uint64_t storages(int states) {
    uint64_t own =
        number_of(kParamType, kParam) | number_of(kGradType, kGrad) | number_of(kMasterType, kMaster);
    for (int k = 0; k < states; ++k) own |= number_of(kStateType, kFirstState + k);
    return own;
  }
};

// One combination of rows that draw random words. States of int8 are codes: means, and of two states the
// second roots. What is stored in 16 bits, but for a parameter beside a master weight, is rounded
// stochastically or not.
template <DType kParamType, DType kMasterType, DType kStateType, bool kStochastic = false>
struct DrawnLayout {
  using Words = VectorWords;
  static constexpr bool kDraws = true;
  static constexpr bool kCodes = kStateType == DType::int8;
  static constexpr int kVector = 16 / widest({kParamType, kMasterType, kStateType});
  static constexpr int kParamBytes = size_of(kParamType) + size_of(kMasterType);
  static constexpr int kGradBytes = size_of(kParamType);
  static constexpr int kStateBytes = size_of(kStateType);
  using ParamStorage = typename StorageOf<kParamType>::type;
  using StateStorage = typename StorageOf<kStateType>::type;
  template <class T, Reuse kReuse>
  using Param =
      typename std::conditional<kMasterType == DType::int8, Split8Columns<kReuse>,
                                RoundedColumn<ParamColumn<ParamStorage, kReuse>, kStochastic>>::type;
  template <class T>
  using Grad = FixedColumn<ParamStorage, Reuse::none>;
  template <class T, Reuse kReuse>
  using State =
      typename std::conditional<kCodes, CodeColumn,
                                RoundedColumn<FixedColumn<StateStorage, kReuse>, kStochastic>>::type;

  FO_DEVICE static bool fits(uint64_t storages, bool stochastic, int states) {
    uint64_t own =
        number_of(kParamType, kParam) | number_of(kParamType, kGrad) | number_of(kMasterType, kMaster);
    for (int k = 0; k < states; ++k)
      own |= number_of(kCodes && k == 1 ? DType::uint8 : kStateType, kFirstState + k);
    const bool rounds =
        (kMasterType == DType::none && size_of(kParamType) == 2) || (states > 0 && size_of(kStateType) == 2);
    return storages == own && (!rounds || stochastic == kStochastic);
  }
};

// Every combination: elements, not vectors.
template <class T>
struct AnyLayout {
  using Words = NoWords;
  static constexpr bool kDraws = false, kCodes = false;
  static constexpr int kVector = 1;
  template <class U, Reuse>
  using Param = AnyParamColumns<U>;
  template <class U>
  using Grad = AnyColumn<U>;
  template <class U, Reuse>
  using State = AnyColumn<U>;
};

// The same where rows may draw random words.
template <class T>
struct AnyDrawnLayout {
  using Words = AnyWords;
  static constexpr bool kDraws = false, kCodes = false;  // but for what the row says
  static constexpr int kVector = 1;
  template <class U, Reuse>
  using Param = DrawnParamColumns<U>;
  template <class U>
  using Grad = AnyColumn<U>;
  template <class U, Reuse>
  using State = DrawnState<U>;
};

template <class... L>
struct LayoutList {};

// The table of combinations that have code of their own, computed in float: param, grad, master weight,
// states. Rules whose states differ among themselves, and everything else that the plan admits, take the last
// entry.
constexpr DType kNone = DType::none, kF32 = DType::float32, kF64 = DType::float64, kBf16 = DType::bfloat16,
                kF16 = DType::float16, kSplit = DType::remainder;
using FloatLayouts = LayoutList<Layout<kF32, kF32, kNone, kF32>,     // 4 + 4 bytes an element, 4 a state
                                Layout<kBf16, kBf16, kNone, kBf16>,  //
                                Layout<kBf16, kBf16, kNone, kF32>,   // state_dtype=torch.float32
                                Layout<kF16, kF16, kNone, kF16>,     //
                                Layout<kF16, kF16, kNone, kF32>,     //
                                Layout<kBf16, kBf16, kF32, kF32>,    // master_weights="float32"
                                Layout<kBf16, kF32, kF32, kF32>,  // the same with gradients kept in float32
                                Layout<kF16, kF16, kF32, kF32>,   //
                                Layout<kBf16, kBf16, kSplit, kF32>,  // master_weights="split"
                                AnyLayout<float>>;
// For a rule without states, where some of those are the same.
using StatelessLayouts = LayoutList<Layout<kF32, kF32, kNone, kF32>,     //
                                    Layout<kBf16, kBf16, kNone, kBf16>,  //
                                    Layout<kF16, kF16, kNone, kF16>,     //
                                    Layout<kBf16, kBf16, kF32, kF32>,    //
                                    Layout<kBf16, kF32, kF32, kF32>,     //
                                    Layout<kBf16, kBf16, kSplit, kF32>,  //
                                    AnyLayout<float>>;

// Those of rows that draw random words. A sum has one order, so that none are where a direction is measured.
constexpr DType kSplit8 = DType::int8, kEightBit = DType::int8;
using DrawnFloatLayouts = LayoutList<DrawnLayout<kF32, kNone, kEightBit>,         //
                                     DrawnLayout<kBf16, kNone, kEightBit>,        //
                                     DrawnLayout<kBf16, kNone, kEightBit, true>,  //
                                     DrawnLayout<kBf16, kSplit8, kEightBit>,      //
                                     DrawnLayout<kBf16, kSplit8, kF32>,           //
                                     DrawnLayout<kBf16, kNone, kBf16, true>>;
using DrawnStatelessLayouts =
    LayoutList<DrawnLayout<kBf16, kSplit8, kBf16>, DrawnLayout<kBf16, kNone, kBf16, true>>;

template <class T, bool kUpdates, int kStates>
using DrawnLayouts = typename std::conditional<
    sizeof(T) == 8 || !kUpdates || (kStates > 2), LayoutList<>,
    typename std::conditional<kStates == 0, DrawnStatelessLayouts, DrawnFloatLayouts>::type>::type;

template <int kStates>
using Layouts = typename std::conditional<kStates == 0, StatelessLayouts, FloatLayouts>::type;

}  // namespace fused_optim
