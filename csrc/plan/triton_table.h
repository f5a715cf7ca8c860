// The table of rows whose kernels others launch (Triton's, from Python): 64-bit words, field by field.
//
// First the groups, then the rows: [kGroupFields][groups], [kRowFields][rows]. A double stands as its bits,
// an address and a number as they are. kernels/table.py has the same fields in the same order.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/phases.h"

namespace fused_optim {

constexpr int kTrustFields = sizeof(TrustRatio) / sizeof(double);
// maximize, needs, the trust ratio; hyperparameters, and where and as what those lie that are tensors.
constexpr int kGroupFields = 2 + kTrustFields + 3 * kMaxHyper;
// grad, active, the other addresses, numel, the two scales, group, clipped, trusted, and the dtypes: eight
// bits a column.
constexpr int kRowFields = 2 + (kColumns - 1) + 7;

class FieldWriter {
 public:
  FieldWriter(int64_t* words, size_t count) : words_(words), count_(count) {}

  // The next field of item i.
  void put(size_t i, int64_t word) { words_[count_ * field_++ + i] = word; }
  void put(size_t i, uint64_t word) { put(i, static_cast<int64_t>(word)); }
  void put(size_t i, bool word) { put(i, static_cast<int64_t>(word)); }
  void put(size_t i, double number) {
    int64_t word;
    std::memcpy(&word, &number, sizeof word);
    put(i, word);
  }
  void next_item() { field_ = 0; }

 private:
  int64_t* words_;
  size_t count_;
  size_t field_ = 0;
};

inline void write_launch_table(const std::vector<Row>& rows, const std::vector<GroupHyper>& groups,
                               const std::vector<HyperTensors>& tensors, int64_t* words) {
  FieldWriter group_writer(words, groups.size());
  for (size_t g = 0; g < groups.size(); ++g, group_writer.next_item()) {
    const GroupHyper& group = groups[g];
    group_writer.put(g, group.maximize);
    group_writer.put(g, group.needs);
    double trust[kTrustFields];
    std::memcpy(trust, &group.trust, sizeof trust);
    for (const double number : trust) group_writer.put(g, number);
    for (const double number : group.rule) group_writer.put(g, number);
    for (const uint64_t address : tensors[g].address) group_writer.put(g, address);
    for (const DType dtype : tensors[g].dtype) group_writer.put(g, static_cast<int64_t>(dtype));
  }
  FieldWriter writer(words + kGroupFields * groups.size(), rows.size());
  for (size_t r = 0; r < rows.size(); ++r, writer.next_item()) {
    const Row& row = rows[r];
    // An inactive row's addresses may be stale: nobody sees them.
    const auto address = [&](int column) { return row.active ? row.address[column] : 0; };
    writer.put(r, address(kGrad));
    writer.put(r, row.active);
    uint64_t storages = 0;
    for (int column = 0; column < kColumns; ++column) {
      storages |= static_cast<uint64_t>(row.dtype[column]) << (8 * column);
      if (column != kGrad) writer.put(r, address(column));
    }
    writer.put(r, row.numel);
    writer.put(r, row.lr_scale);
    writer.put(r, row.weight_decay_scale);
    writer.put(r, static_cast<int64_t>(row.group));
    writer.put(r, row.clipped);
    writer.put(r, row.trusted);
    writer.put(r, storages);
  }
}

}  // namespace fused_optim
