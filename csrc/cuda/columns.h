// Columns of a row as the kernels walk them.
//
// `fetch` asks for N elements from i + plus on, which lie at a multiple of their size together; `widen` waits
// for them; `narrow` makes of numbers what `put` writes. `plus` is a constant, so that one address serves
// several vectors.
#pragma once

#include <type_traits>

#include "cuda/words.h"

namespace fused_optim {

// A column whose storage is known when the kernel is compiled.
template <class S, Reuse kLoaded, Reuse kStored = kLoaded>
struct FixedColumn {
  static constexpr int kColumns = 1;
  template <int N>
  using Loaded = Vector<S, N>;
  uint64_t address;

  FO_DEVICE FixedColumn(const Row& row, int index, int64_t begin)
      : address(row.address[index] + static_cast<uint64_t>(begin) * sizeof(S)) {
#if defined(__CUDA_ARCH__)
    asm("" : "+l"(address));  // one number: not a sum whose parts are added anew for every vector
#endif
  }

  FO_DEVICE void* at(int i, int plus) const {
    return reinterpret_cast<S*>(address + uint64_t{static_cast<uint32_t>(i)} * sizeof(S)) + plus;
  }
  template <int N>
  FO_DEVICE Loaded<N> fetch(int i, int plus) const {
    return load_global<kLoaded, Loaded<N>>(at(i, plus));
  }
  template <class T, int N>
  FO_DEVICE void widen(const Vector<S, N>& loaded, T (&out)[N]) const {
    fused_optim::widen(loaded, out);
  }
  template <class T, int N>
  FO_DEVICE void narrow(const T (&values)[N], Vector<S, N>& out, NoWords = {}) const {
    fused_optim::narrow(values, out);
  }
  template <class T, int N>
  FO_DEVICE static bool is_not_sure(const T (&values)[N], const Vector<S, N>&) {
    return any_nan(values);
  }
  template <int N>
  FO_DEVICE void put(int i, int plus, const Vector<S, N>& vector) const {
    store_global<kStored>(at(i, plus), vector);
  }
};

// Where the scales of a tile's codes are; index: of a state's column, or of one that a rule does not have.
FO_DEVICE uint64_t scales_at(const Row& row, int index, int64_t begin) {
  return row.scale[index < kFirstState ? 0 : index - kFirstState] + static_cast<uint64_t>(begin) / kGroup;
}

// The parameter as a rule sees it: itself, or its master weight, or what it is the upper half of, beside
// which it is a rounded copy.
template <class S, Reuse kReuse>
using ParamColumn = FixedColumn<S, kReuse, Reuse::soon>;

template <class S, class M, Reuse kReuse>
struct MasterColumns {
  static constexpr int kColumns = 2;
  template <int N>
  struct Loaded {
    Vector<S, N> param;
    Vector<M, N> master;
  };
  ParamColumn<S, kReuse> param;
  FixedColumn<M, kReuse, Reuse::none> master;

  FO_DEVICE MasterColumns(const Row& row, int index, int64_t begin)
      : param(row, index, begin), master(row, kMaster, begin) {}
  template <int N>
  FO_DEVICE Loaded<N> fetch(int i, int plus) const {
    return {param.template fetch<N>(i, plus), master.template fetch<N>(i, plus)};
  }
  template <class T, int N>
  FO_DEVICE void widen(const Loaded<N>& loaded, T (&out)[N]) const {
    widen_whole(loaded.param, loaded.master, out);
  }
  template <class T, int N>
  FO_DEVICE void narrow(const T (&values)[N], Loaded<N>& out, NoWords) const {
    narrow_whole(values, out.param, out.master);
  }
  template <int N>
  FO_DEVICE void put(int i, int plus, const Loaded<N>& out) const {
    master.template put<N>(i, plus, out.master);
    param.template put<N>(i, plus, out.param);
  }
};

// What lies in memory of a column whose storage is read from the row, element by element. kBytes: it may be
// one byte. An element waits as bits, since to ask for the storage is to branch.
template <class T, bool kBytes>
struct StoredColumn {
  using Bits = typename std::conditional<sizeof(T) == 8, uint64_t, uint32_t>::type;
  uint64_t address;
  DType dtype;

  FO_DEVICE StoredColumn(const Row& row, int index, int64_t begin)
      : address(row.address[index] +
                static_cast<uint64_t>(begin) * static_cast<uint64_t>(size_of(row.dtype[index]))),
        dtype(row.dtype[index]) {}

  FO_DEVICE Bits fetch_bits(int i) const {
    Bits bits = 0;
    const int bytes = size_of(dtype);
    const void* at = reinterpret_cast<const void*>(address + static_cast<uint64_t>(i * bytes));
    if constexpr (kBytes) {
      if (bytes == 1) bits = load_global<Reuse::none, uint8_t>(at);
    }
    if (bytes == 2) bits = load_global<Reuse::none, uint16_t>(at);
    if (bytes == 4) bits = load_global<Reuse::none, uint32_t>(at);
    if constexpr (sizeof(T) == 8) {
      if (bytes == 8) bits = load_global<Reuse::none, uint64_t>(at);
    }
    return bits;
  }
  FO_DEVICE void put_bits(int i, Bits bits) const {
    const int bytes = size_of(dtype);
    void* at = reinterpret_cast<void*>(address + static_cast<uint64_t>(i * bytes));
    if constexpr (kBytes) {
      if (bytes == 1) store_global<Reuse::none>(at, static_cast<uint8_t>(bits));
    }
    if (bytes == 2) store_global<Reuse::none>(at, static_cast<uint16_t>(bits));
    if (bytes == 4) store_global<Reuse::none>(at, static_cast<uint32_t>(bits));
    if constexpr (sizeof(T) == 8) {
      if (bytes == 8) store_global<Reuse::none>(at, bits);
    }
  }
};

// A column of numbers for every combination that has no code of its own.
template <class T>
struct AnyColumn : StoredColumn<T, false> {
  using Stored = StoredColumn<T, false>;
  using Stored::dtype;
  using Stored::Stored;
  using Bits = typename Stored::Bits;
  template <int N>
  using Loaded = Bits;

  template <int N>
  FO_DEVICE Bits fetch(int i, int plus) const {
    static_assert(N == 1, "an element");
    return this->fetch_bits(i + plus);
  }

  FO_DEVICE void widen(Bits bits, T (&out)[1]) const {
    const auto half = static_cast<uint16_t>(bits);
    if (dtype == DType::float32) out[0] = static_cast<T>(float_of(static_cast<uint32_t>(bits)));
    if (dtype == DType::bfloat16) out[0] = static_cast<T>(load(bfloat16{half}));
    if (dtype == DType::float16) out[0] = static_cast<T>(load(float16{half}));
    if constexpr (sizeof(T) == 8) {
      if (dtype == DType::float64) __builtin_memcpy(out, &bits, sizeof bits);
    }
  }

  FO_DEVICE static bool is_not_sure(const T (&)[1], Bits) { return false; }
  FO_DEVICE void narrow(const T (&values)[1], Bits& out, NoWords) const {
    const auto value = static_cast<float>(values[0]);
    if (dtype == DType::float32) out = bits_of(value);
    if (dtype == DType::bfloat16) out = stored<bfloat16>(value);
    if (dtype == DType::float16) out = stored<float16>(value);
    if constexpr (sizeof(T) == 8) {
      if (dtype == DType::float64) __builtin_memcpy(&out, values, sizeof out);
    }
  }

  template <int N>
  FO_DEVICE void put(int i, int plus, Bits bits) const {
    static_assert(N == 1, "an element");
    this->put_bits(i + plus, bits);
  }

 private:
  template <class S>
  FO_DEVICE static uint16_t stored(float value) {
    S stored;
    store(stored, value);
    return stored.bits;
  }
};

// The parameter as a rule sees it, for every combination: itself, or with what is beside it.
template <class T>
struct AnyParamColumns {
  static constexpr int kColumns = 2;
  using Bits = typename AnyColumn<T>::Bits;
  template <int N>
  struct Loaded {
    Bits param, master;
  };
  AnyColumn<T> param, master;

  FO_DEVICE AnyParamColumns(const Row& row, int index, int64_t begin)
      : param(row, index, begin), master(row, kMaster, begin) {}
  template <int N>
  FO_DEVICE Loaded<N> fetch(int i, int plus) const {
    return {param.template fetch<N>(i, plus), master.template fetch<N>(i, plus)};
  }
  template <int N>
  FO_DEVICE void put(int i, int plus, const Loaded<N>& out) const {
    master.template put<N>(i, plus, out.master);
    param.template put<N>(i, plus, out.param);
  }

  FO_DEVICE void widen(const Loaded<1>& loaded, T (&out)[1]) const {
    if constexpr (sizeof(T) == 4) {  // a float64 parameter has no master weight
      if (master.dtype == DType::remainder) return widen_as<bfloat16, int16_t>(loaded, out);
      if (master.dtype == DType::float32 && param.dtype == DType::bfloat16)
        return widen_as<bfloat16, float>(loaded, out);
      if (master.dtype == DType::float32) return widen_as<float16, float>(loaded, out);
    }
    param.widen(loaded.param, out);
  }
  FO_DEVICE void narrow(const T (&values)[1], Loaded<1>& out, NoWords words) const {
    if constexpr (sizeof(T) == 4) {
      if (master.dtype == DType::remainder) return narrow_as<bfloat16, int16_t>(values, out);
      if (master.dtype == DType::float32 && param.dtype == DType::bfloat16)
        return narrow_as<bfloat16, float>(values, out);
      if (master.dtype == DType::float32) return narrow_as<float16, float>(values, out);
    }
    param.narrow(values, out.param, words);
  }

 private:
  template <class S, class M>
  FO_DEVICE static void widen_as(const Loaded<1>& loaded, T (&out)[1]) {
    Vector<S, 1> param;
    Vector<M, 1> master;
    param.word[0] = static_cast<uint16_t>(loaded.param);
    master.word[0] = static_cast<typename Vector<M, 1>::Word>(loaded.master);
    widen_whole(param, master, out);
  }
  template <class S, class M>
  FO_DEVICE static void narrow_as(const T (&values)[1], Loaded<1>& out) {
    Vector<S, 1> param;
    Vector<M, 1> master;
    narrow_whole(values, param, master);
    out.param = param.word[0];
    out.master = master.word[0];
  }
};

}  // namespace fused_optim
