// What a refresh reads, in order: between two steps of a training the caches have been used for other things,
// and the next refresh most likely reads the same. It asks for each thing well before it comes to it.
//
// Addresses are hints: nothing is read through them, so what has moved or died costs a useless line.
#pragma once

#include <cstddef>
#include <vector>

namespace fused_optim {

class Trail {
 public:
  // A tensor: the Python object, its TensorImpl, its StorageImpl. A dict: itself and its keys.
  struct Thing {
    const char *object, *body, *storage;
  };

  // A new refresh.
  void begin() {
    passed_ = 0;
    for (size_t i = 0; i < kAhead && i < things_.size(); ++i) ask_for(things_[i]);
  }

  // The thing that is read next.
  void pass(const Thing& thing) {
    if (passed_ < things_.size()) {
      things_[passed_] = thing;
    } else {
      things_.push_back(thing);
    }
    ++passed_;
    if (passed_ + kAhead <= things_.size()) ask_for(things_[passed_ + kAhead - 1]);
  }

 private:
  static constexpr size_t kAhead = 24;  // four rows of AdamW
  static constexpr size_t kLine = 64;   // bytes
  static constexpr size_t kBodyLines = 3;

  // A function that only prefetches is pure to GCC, which drops calls of it: it must not remain one.
  __attribute__((always_inline)) static void ask_for(const Thing& thing) {
    __builtin_prefetch(thing.object);
    for (size_t line = 0; line < kBodyLines; ++line) __builtin_prefetch(thing.body + line * kLine);
    __builtin_prefetch(thing.storage);
  }

  std::vector<Thing> things_;
  size_t passed_ = 0;
};

}  // namespace fused_optim
