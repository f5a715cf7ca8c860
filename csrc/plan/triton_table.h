// The table of rows that Triton's kernels step: 64-bit words, field by field.
//
// First the groups, then the rows: [fields of a group][groups], [fields of a row][rows]. A double stands as
// its bits, an address and a number as they are. kernels/table.py lists the same fields in the same order.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "prepare.h"

namespace fused_optim {

// Behind the dtypes of a row's columns in one word.
constexpr int kDrawsBit = 8 * kColumns;
static_assert(kDrawsBit + 2 < 64, "no room behind the dtypes");

template <class Value>
int64_t word_of(Value value) {
  return static_cast<int64_t>(value);
}
inline int64_t word_of(double number) {
  int64_t word;
  std::memcpy(&word, &number, sizeof word);
  return word;
}

// Calls field(name, index of an array's element or -1, word) for each field of a group.
template <class Field>
void for_each_group_field(const GroupHyper& group, const HyperTensors& tensors, const Field& field) {
  const TrustRatio& trust = group.trust;
  field("maximize", -1, word_of(group.maximize));
  field("needs", -1, word_of(group.needs));
  field("coefficient", -1, word_of(trust.coefficient));
  field("eps", -1, word_of(trust.eps));
  field("min_update", -1, word_of(trust.min_update));
  field("clip", -1, word_of(trust.clip));
  field("zero_norm", -1, word_of(trust.zero_norm));
  field("weight_decay", -1, word_of(trust.weight_decay));
  field("always", -1, word_of(trust.always));
  field("present", -1, word_of(trust.present));
  for (int i = 0; i < kMaxHyper; ++i) field("hyper", i, word_of(group.rule[i]));
  for (int i = 0; i < kMaxHyper; ++i) field("hyper_address", i, word_of(tensors.address[i]));
  for (int i = 0; i < kMaxHyper; ++i) field("hyper_dtype", i, word_of(tensors.dtype[i]));
}

// The same for each field of a row.
template <class Field>
void for_each_row_field(const Row& row, const Field& field) {
  // An inactive row's addresses may be stale: no kernel sees them.
  const auto address = [&](int column) { return word_of(row.active ? row.address[column] : 0); };
  field("grad", -1, address(kGrad));  // what changes at every step comes first: it is sent in one piece
  field("active", -1, word_of(row.active));
  field("param", -1, address(kParam));
  field("master", -1, address(kMaster));
  for (int i = 0; i < kMaxStates; ++i) field("state", i, address(kFirstState + i));
  field("numel", -1, word_of(row.numel));
  field("lr_scale", -1, word_of(row.lr_scale));
  field("weight_decay_scale", -1, word_of(row.weight_decay_scale));
  field("group", -1, word_of(row.group));
  field("clipped", -1, word_of(row.clipped));
  field("has_trust_ratio", -1, word_of(row.has_trust_ratio));
  for (int i = 0; i < kMaxStates; ++i) field("scale", i, word_of(row.active ? row.scale[i] : 0));
  field("counter", -1, word_of(row.active ? row.counter : 0));
  field("first", -1, word_of(row.first));
  field("seed", -1, word_of(row.seed));
  field("place", -1, word_of(row.place));
  // The dtype of each column, eight bits each; then whether the row draws, and what that is for.
  uint64_t storages = static_cast<uint64_t>(row.draws) << kDrawsBit | static_cast<uint64_t>(row.stochastic)
                                                                          << (kDrawsBit + 1);
  for (int column = 0; column < kColumns; ++column) {
    storages |= static_cast<uint64_t>(row.dtype[column]) << (8 * column);
  }
  field("storages", -1, word_of(storages));
}

struct TritonFields {
  std::vector<std::string> group, row;
};

inline TritonFields triton_fields() {
  TritonFields fields;
  const auto adds_to = [](std::vector<std::string>& names) {
    return [&names](const char* name, int index, int64_t) {
      names.push_back(index < 0 ? name : name + std::to_string(index));
    };
  };
  for_each_group_field({}, {}, adds_to(fields.group));
  for_each_row_field({}, adds_to(fields.row));
  return fields;
}

inline void write_triton_table(const std::vector<Row>& rows, const std::vector<GroupHyper>& groups,
                               const std::vector<HyperTensors>& tensors, int64_t* words) {
  for (size_t g = 0; g < groups.size(); ++g) {
    int64_t* at = words + g;
    for_each_group_field(groups[g], tensors[g], [&](const char*, int, int64_t word) {
      *at = word;
      at += groups.size();
    });
  }
  static const size_t group_fields = triton_fields().group.size();
  words += group_fields * groups.size();
  for (size_t r = 0; r < rows.size(); ++r) {
    int64_t* at = words + r;
    for_each_row_field(rows[r], [&](const char*, int, int64_t word) {
      *at = word;
      at += rows.size();
    });
  }
}

}  // namespace fused_optim
