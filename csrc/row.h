// The table of a plan: one row a parameter, plain data that host and device share.
#pragma once

#include <cstdint>

namespace fused_optim {

// How a number lies in memory. `none` marks a column that a row does not have; `remainder` holds the lower
// half of a float32 master weight whose upper half is the bfloat16 parameter. A byte is int8 or uint8: of a
// master weight the upper half of such a remainder (int8), of a state a code of codec.h.
enum class DType : uint8_t { none = 0, float32, float64, bfloat16, float16, remainder, int8, uint8 };

constexpr bool is_byte(DType dtype) { return dtype == DType::int8 || dtype == DType::uint8; }

constexpr int size_of(DType dtype) {
  // A digit for each, from the right: on a device branches would hold up the loads that wait for the answer.
  return 0x11222840 >> 4 * static_cast<int>(dtype) & 0xf;
}

// Columns of a row: param, grad, master weight where there is one, then the rule's states in the rule's
// order.
constexpr int kParam = 0;
constexpr int kGrad = 1;
constexpr int kMaster = 2;
constexpr int kFirstState = 3;
constexpr int kMaxStates = 4;
constexpr int kColumns = kFirstState + kMaxStates;

struct Row {
  uint64_t address[kColumns];  // 0: the row has no such column
  // Of a state that is codes: its groups' exponents, a byte for 32 elements; otherwise 0.
  uint64_t scale[kMaxStates];
  // Where the rule counts no steps and the random words need a count: a float32 of the mechanism's own.
  uint64_t counter;
  int64_t first;  // the place in the whole tensor of the first element, for the random words
  int64_t numel;
  double lr_scale;
  double weight_decay_scale;
  int32_t group;   // index of the row's hyperparameters
  int32_t rule;    // index into the list of rules
  uint32_t seed;   // of the random words, and
  uint32_t place;  // the row's place among all parameters of the optimizer
  // One word with `active`, which a device reads at once.
  alignas(8) DType dtype[kColumns];
  bool active;           // has a gradient that this backend takes at this step
  bool clipped;          // takes part in clipping
  bool has_trust_ratio;  // takes part in trust ratios
  bool draws;            // rounds by random words: bytes, and what `stochastic` says
  bool stochastic;       // what is stored in 16 bits, but for a parameter beside a master weight
};

template <class T>
T* column(const Row& row, int index) {
  return reinterpret_cast<T*>(row.address[index]);
}

// The type in which a row is computed: double for float64 parameters, float for all others.
constexpr bool computes_in_double(DType param) { return param == DType::float64; }

}  // namespace fused_optim
