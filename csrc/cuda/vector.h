// Vectors of up to 16 bytes in global memory, and the numbers in them.
//
// What a load has asked for stays as whole words until a number is asked of it: only then does a thread wait,
// and all loads before are under way together. Nothing outside [address, address + n) is touched.
//
// Accesses carry a cache policy. What a step reads and writes exactly once is evicted first (`cs`); what
// another phase or the next forward pass reads stays.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "codec.h"
#include "cuda/quick_float.h"
#include "cuda/tuning.h"
#include "prepare.h"
#include "row.h"
#include "storage.h"

#define FO_DEVICE __device__ __forceinline__

namespace fused_optim {

enum class Reuse { none, soon };

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using type = unsigned char;
};
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

template <Reuse kReuse, class Value>
FO_DEVICE Value load_global(const void* address) {
  using Bits = typename BitsOf<sizeof(Value)>::type;
  const Bits bits = kReuse == Reuse::soon || !FO_STREAMING ? __ldca(static_cast<const Bits*>(address))
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
  if constexpr (kReuse == Reuse::soon || !FO_STREAMING) {
    __stwb(static_cast<Bits*>(address), bits);
  } else {
    __stcs(static_cast<Bits*>(address), bits);
  }
}

// N elements as they lie in memory. Two elements of 16 bits and four of 8 share a word, from which the
// compiler would otherwise take them as soon as it is loaded.
template <class S, int N>
struct Vector {
  static constexpr int kInWord = sizeof(S) < 4 && N > 1 ? 4 / sizeof(S) : 1;
  static constexpr bool kPairs = kInWord == 2;
  static constexpr int kBits = 8 * sizeof(S);
  using Bits = typename BitsOf<sizeof(S)>::type;
  using Word = typename std::conditional<(kInWord > 1), uint32_t, Bits>::type;
  Word word[N / kInWord];

  FO_DEVICE S at(int k) const {
    S element;
    if constexpr (kInWord > 1) {
      const auto bits = static_cast<Bits>(word[k / kInWord] >> k % kInWord * kBits);
      __builtin_memcpy(&element, &bits, sizeof element);
    } else {
      __builtin_memcpy(&element, &word[k], sizeof element);
    }
    return element;
  }
  // In order: the first of a word before the others.
  FO_DEVICE void put(int k, S element) {
    if constexpr (kInWord > 1) {
      Bits bits;
      __builtin_memcpy(&bits, &element, sizeof bits);
      const int shift = k % kInWord * kBits;
      word[k / kInWord] = shift == 0 ? bits : word[k / kInWord] | static_cast<uint32_t>(bits) << shift;
    } else {
      __builtin_memcpy(&word[k], &element, sizeof element);
    }
  }
};

// Numbers -------------------------------------------------------------------------------------------------
//
// As storage.h has them, one by one. For QuickFloats, none of which counts if it is NaN, the processor's own
// conversions do where it has them: they differ in what they make of a NaN.

template <class T, class S>
FO_DEVICE T widen(S stored) {
  if constexpr (std::is_same<T, QuickFloat>::value && std::is_same<S, float16>::value) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored.bits));
    return value;
#else
    return load(stored);
#endif
  } else {
    return static_cast<T>(load(stored));
  }
}

template <class T, class S, int N>
FO_DEVICE void widen(const Vector<S, N>& stored, T (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = widen<T>(stored.at(k));
}

FO_DEVICE uint32_t pack(bfloat16, float low, float high) {
  uint32_t bits;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#else
  bfloat16 one, other;
  store(one, low);
  store(other, high);
  bits = one.bits | static_cast<uint32_t>(other.bits) << 16;
#endif
  return bits;
}

FO_DEVICE uint32_t pack(float16, float low, float high) {
  uint32_t bits;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#else
  float16 one, other;
  store(one, low);
  store(other, high);
  bits = one.bits | static_cast<uint32_t>(other.bits) << 16;
#endif
  return bits;
}

template <class S, int N>
FO_DEVICE void narrow(const float (&values)[N], Vector<S, N>& out) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    S element;
    store(element, values[k]);
    out.put(k, element);
  }
}

template <class S, int N>
FO_DEVICE void narrow(const QuickFloat (&values)[N], Vector<S, N>& out) {
  if constexpr (Vector<S, N>::kPairs) {
#pragma unroll
    for (int k = 0; k < N; k += 2) out.word[k / 2] = pack(S{}, values[k].value, values[k + 1].value);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out.put(k, values[k].value);
  }
}

template <class S, int N>
FO_DEVICE void narrow(const double (&values)[N], Vector<S, N>& out) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    S element;
    if constexpr (sizeof(S) == 8) {
      store(element, values[k]);
    } else {
      store(element, static_cast<float>(values[k]));
    }
    out.put(k, element);
  }
}

// A parameter and its master weight, or what it lacks of it: load_master, load_split, store_ties_away and
// store_split. For a QuickFloat a master that is NaN need not be told from one that rounds to another
// parameter, nor a split that makes a NaN be mended: a NaN is what comes of either.
FO_DEVICE float load_whole(bfloat16 param, int16_t lower) { return load_split(param, lower); }
FO_DEVICE float load_whole(bfloat16 param, int8_t remainder) { return load_split8(param, remainder); }
template <class S>
FO_DEVICE float load_whole(S param, float master) {
  return load_master(param, master);
}

FO_DEVICE QuickFloat load_whole_quickly(bfloat16 param, int16_t lower) {
  const uint32_t upper = static_cast<uint32_t>(param.bits) << 16;
  return float_of(upper + static_cast<uint32_t>(static_cast<int32_t>(lower)));
}
FO_DEVICE QuickFloat load_whole_quickly(bfloat16 param, float master) {
  const uint32_t upper = static_cast<uint32_t>(param.bits) << 16;
  return ((bits_of(master) + 0x8000u) ^ upper) < 0x10000u ? master : float_of(upper);
}
FO_DEVICE QuickFloat load_whole_quickly(float16 param, float master) {
  const auto rounded = static_cast<uint16_t>(pack(param, master, master));
  return rounded == param.bits ? master : widen<QuickFloat>(param).value;
}

template <class T, class S, class M, int N>
FO_DEVICE void widen_whole(const Vector<S, N>& param, const Vector<M, N>& master, T (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if constexpr (std::is_same<T, QuickFloat>::value) {
      out[k] = load_whole_quickly(param.at(k), master.at(k));
    } else {
      out[k] = static_cast<T>(load_whole(param.at(k), master.at(k)));
    }
  }
}

template <class S, class M, int N>
FO_DEVICE void narrow_whole(const float (&values)[N], Vector<S, N>& param, Vector<M, N>& master) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    S rounded;
    if constexpr (sizeof(M) == 2) {
      M lower;
      store_split(rounded, lower, values[k]);
      master.put(k, lower);
    } else {
      store_ties_away(rounded, values[k]);
      master.put(k, values[k]);
    }
    param.put(k, rounded);
  }
}

template <class S, class M, int N>
FO_DEVICE void narrow_whole(const QuickFloat (&values)[N], Vector<S, N>& param, Vector<M, N>& master) {
  if constexpr (std::is_same<S, float16>::value) {
    narrow(values, param);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      param.put(k, bfloat16{static_cast<uint16_t>((bits_of(values[k].value) + 0x8000u) >> 16)});
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if constexpr (sizeof(M) == 2) {
      master.put(k, static_cast<M>(static_cast<uint16_t>(bits_of(values[k].value))));
    } else {
      master.put(k, values[k].value);
    }
  }
}

// What a rule sees of gradient elements, in place. Weight decay is asked for once a vector.
template <class T, int N>
FO_DEVICE void transform(const GradTransform<T>& grad, T (&values)[N], const T (&param)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) values[e] = transform(grad, values[e]);
  if (grad.weight_decay != 0) {
#if defined(__CUDA_ARCH__)
    // A barrier makes a branch of it. Else every vector would pay for a sum that is seldom taken.
    if (N > 1) asm volatile("bar.warp.sync 0xffffffff;");
#endif
#pragma unroll
    for (int e = 0; e < N; ++e) values[e] = values[e] + grad.weight_decay * param[e];
  }
}

template <class T, int N>
FO_DEVICE bool any_nan(const T (&values)[N]) {
  bool nan = false;
  if constexpr (N > 1) {
#pragma unroll
    for (int e = 0; e < N; e += 2) nan = nan | ((values[e] != values[e]) | (values[e + 1] != values[e + 1]));
  }
  return nan;
}

template <class T>
FO_DEVICE bool has_quick_bounds(const GradTransform<T>& grad) {
  return grad.min != 0 && grad.max != 0;
}

}  // namespace fused_optim
