// Vectors of up to 16 bytes in global memory, and columns of a row as the kernels walk them.
//
// A column is read and written in vectors where its address allows it and by elements where not: under DDP's
// bucket views a gradient lies at 4, 8 or 12 mod 16 while everything else is aligned, and then only the
// gradient is read narrow. The four narrow loads of a vector meet in the first-level cache, so that device
// memory sees the same traffic. Nothing outside [address, address + n) is touched.
//
// Accesses carry a cache policy. What a step reads and writes exactly once is evicted first (`cs`); what
// another phase or the next forward pass reads stays.
#pragma once

#include <cuda_runtime.h>

#include "row.h"
#include "storage.h"

#define FO_DEVICE __device__ __forceinline__

namespace fused_optim {

enum class Reuse { none, soon };

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = unsigned short;
};
template <>
struct BitsOf<4> {
  using type = unsigned int;
};
template <>
struct BitsOf<8> {
  using type = uint2;
};
template <>
struct BitsOf<16> {
  using type = uint4;
};

// N elements as they lie in memory.
template <class S, int N>
struct alignas(sizeof(S) * N) Vector {
  S element[N];
};

template <Reuse kReuse, class Value>
FO_DEVICE Value load_global(const void* address) {
  using Bits = typename BitsOf<sizeof(Value)>::type;
  const Bits bits = kReuse == Reuse::soon ? __ldca(static_cast<const Bits*>(address))
                                          : __ldcs(static_cast<const Bits*>(address));
  Value value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <Reuse kReuse, class Value>
FO_DEVICE void store_global(void* address, const Value& value) {
  using Bits = typename BitsOf<sizeof(Value)>::type;
  Bits bits;
  __builtin_memcpy(&bits, &value, sizeof value);
  if constexpr (kReuse == Reuse::soon) {
    __stwb(static_cast<Bits*>(address), bits);
  } else {
    __stcs(static_cast<Bits*>(address), bits);
  }
}

template <int kBytes>
FO_DEVICE bool is_aligned(uint64_t address) {
  return address % kBytes == 0;
}

// Elements [i, i + N) of a column, of which only the first `n` exist; the others are zero.
template <Reuse kReuse, class S, int N>
FO_DEVICE Vector<S, N> load_vector(const S* column, int i, int n, bool aligned) {
  if (aligned && n >= N) return load_global<kReuse, Vector<S, N>>(column + i);
  Vector<S, N> vector{};
#pragma unroll
  for (int k = 0; k < N; ++k) {
    // The next elements are in the same sectors: these must stay in the first-level cache until then.
    if (k < n) vector.element[k] = load_global<Reuse::soon, S>(column + i + k);
  }
  return vector;
}

template <Reuse kReuse, class S, int N>
FO_DEVICE void store_vector(S* column, int i, int n, bool aligned, const Vector<S, N>& vector) {
  if (aligned && n >= N) return store_global<kReuse>(column + i, vector);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (k < n) store_global<kReuse>(column + i + k, vector.element[k]);
  }
}

// A column whose storage is known when the kernel is compiled.
template <class T, class S, int N, Reuse kReuse = Reuse::none>
struct FixedColumn {
  using Loaded = Vector<S, N>;
  S* address;
  bool aligned;

  FO_DEVICE explicit FixedColumn(uint64_t at)
      : address(reinterpret_cast<S*>(at)), aligned(is_aligned<sizeof(S) * N>(at)) {}

  FO_DEVICE FixedColumn(const Row& row, int index, int64_t begin)
      : FixedColumn(row.address[index] + static_cast<uint64_t>(begin) * sizeof(S)) {}

  FO_DEVICE Loaded fetch(int i, int n) const { return load_vector<kReuse, S, N>(address, i, n, aligned); }

  FO_DEVICE static void widen(const Loaded& loaded, T (&out)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = static_cast<T>(load(loaded.element[k]));
  }

  // What is read again of a value that is put.
  FO_DEVICE T rounded(T value) const {
    S stored;
    store(stored, value);
    return static_cast<T>(load(stored));
  }

  FO_DEVICE void put(int i, int n, const T (&values)[N]) const {
    Vector<S, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) store(out.element[k], values[k]);
    store_vector<kReuse, S, N>(address, i, n, aligned, out);
  }
};

// A column whose storage is read from the row: for every combination that has no kernel of its own.
template <class T, int N>
struct AnyColumn {
  struct Loaded {
    T element[N];
  };
  uint64_t address;
  DType dtype;

  FO_DEVICE AnyColumn(const Row& row, int index, int64_t begin)
      : address(row.address[index] +
                static_cast<uint64_t>(begin) * static_cast<uint64_t>(size_of(row.dtype[index]))),
        dtype(row.dtype[index]) {}

  template <class S>
  FO_DEVICE void fetch_as(int i, int n, T (&out)[N]) const {
    const bool aligned = is_aligned<sizeof(S) * N>(address);
    const auto vector = load_vector<Reuse::none, S, N>(reinterpret_cast<const S*>(address), i, n, aligned);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = static_cast<T>(load(vector.element[k]));
  }

  FO_DEVICE Loaded fetch(int i, int n) const {
    Loaded loaded{};
    if (dtype == DType::float32) fetch_as<float>(i, n, loaded.element);
    if (dtype == DType::bfloat16) fetch_as<bfloat16>(i, n, loaded.element);
    if (dtype == DType::float16) fetch_as<float16>(i, n, loaded.element);
    if constexpr (sizeof(T) == 8) {
      if (dtype == DType::float64) fetch_as<double>(i, n, loaded.element);
    }
    return loaded;
  }

  FO_DEVICE static void widen(const Loaded& loaded, T (&out)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = loaded.element[k];
  }

  template <class S>
  FO_DEVICE void put_as(int i, int n, const T (&values)[N]) const {
    Vector<S, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if constexpr (sizeof(S) == 8) {
        store(out.element[k], static_cast<double>(values[k]));
      } else {
        store(out.element[k], static_cast<float>(values[k]));
      }
    }
    store_vector<Reuse::none, S, N>(reinterpret_cast<S*>(address), i, n, is_aligned<sizeof(S) * N>(address),
                                    out);
  }

  FO_DEVICE T rounded(T value) const {
    if (dtype == DType::float32) return rounded_as<float>(value);
    if (dtype == DType::bfloat16) return rounded_as<bfloat16>(value);
    if (dtype == DType::float16) return rounded_as<float16>(value);
    return value;
  }

  template <class S>
  FO_DEVICE static T rounded_as(T value) {
    S stored;
    store(stored, static_cast<float>(value));
    return static_cast<T>(load(stored));
  }

  FO_DEVICE void put(int i, int n, const T (&values)[N]) const {
    if (dtype == DType::float32) put_as<float>(i, n, values);
    if (dtype == DType::bfloat16) put_as<bfloat16>(i, n, values);
    if (dtype == DType::float16) put_as<float16>(i, n, values);
    if constexpr (sizeof(T) == 8) {
      if (dtype == DType::float64) put_as<double>(i, n, values);
    }
  }
};

}  // namespace fused_optim
