// Random words of a tile's elements, as columns ask for them; codec.h has what a word is. A layout says which
// of these its columns round by.
#pragma once

#include "codec.h"
#include "cuda/vector.h"

namespace fused_optim {

// A layout that rounds to nearest asks for none.
struct NoWords {
  NoWords() = default;
  FO_DEVICE NoWords(const Row&, uint32_t, int64_t) {}
  template <int N>
  FO_DEVICE NoWords of(int) const {
    return *this;
  }
  FO_DEVICE NoWords to_nearest() const { return *this; }
};

// Of one element.
struct AnyWord {
  uint32_t bits;
  bool stochastic;  // whether stores of 16 bits are

  FO_DEVICE AnyWord to_nearest() const { return {bits, false}; }
};

struct AnyWords {
  uint32_t key;
  int64_t first;  // the place in the whole tensor of the tile's first element
  bool stochastic;

  FO_DEVICE AnyWords(const Row& row, uint32_t key_, int64_t begin)
      : key(key_), first(row.first + begin), stochastic(row.stochastic) {}
  template <int N>
  FO_DEVICE AnyWord of(int i) const {
    static_assert(N == 1, "an element");
    const int64_t place = first + i;
    return {random_word(upper_key(key, place), static_cast<uint32_t>(place)), stochastic};
  }
};

// The largest of kLanes lanes that lie side by side, in each of them.
template <int kLanes>
FO_DEVICE int32_t largest_of_lanes(int32_t value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const int32_t other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace fused_optim
