// The table of a plan: one row a parameter, plain data that host and device share.
#pragma once

#include <cstdint>

namespace fused_optim {

// How a number lies in memory. `none` marks a column that a row does not have; `remainder` holds the lower
// half of a float32 master weight whose upper half is the bfloat16 parameter.
enum class DType : uint8_t { none = 0, float32, float64, bfloat16, float16, remainder };

constexpr int size_of(DType dtype) {
  return dtype == DType::none ? 0 : dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
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
  int64_t numel;
  double lr_scale;
  double weight_decay_scale;
  int32_t group;  // index of the row's hyperparameters
  int32_t rule;   // index into the list of rules
  // One word with `active`, which a device reads at once.
  alignas(8) DType dtype[kColumns];
  bool active;           // has a gradient that this backend takes at this step
  bool clipped;          // takes part in clipping
  bool has_trust_ratio;  // takes part in trust ratios
};

template <class T>
T* column(const Row& row, int index) {
  return reinterpret_cast<T*>(row.address[index]);
}

// The type in which a row is computed: double for float64 parameters, float for all others.
constexpr bool computes_in_double(DType param) { return param == DType::float64; }

}  // namespace fused_optim
