#include "plan/overlaps.h"

#include <algorithm>

#include "codec.h"
#include "plan/rule_names.h"

namespace fused_optim {

void find_overlaps(const std::vector<Row>& rows, std::vector<HostRow>& hosts) {
  struct Range {
    uint64_t begin, end;
    size_t row;
  };
  std::vector<Range> ranges;
  for (size_t r = 0; r < rows.size(); ++r) {
    hosts[r].overlapping = false;
    if (!rows[r].active) continue;
    for (int c = 0; c < kColumns; ++c) {
      if (c == kGrad || rows[r].address[c] == 0) continue;
      const std::vector<bool>& states = names_of_rule(rows[r].rule).per_tensor;
      const auto state = static_cast<size_t>(c - kFirstState);
      if (c >= kFirstState && state >= states.size()) continue;  // the plan's room for a direction
      const bool per_tensor = c >= kFirstState && states[state];
      const auto bytes = static_cast<uint64_t>(per_tensor ? 1 : rows[r].numel) *
                         static_cast<uint64_t>(size_of(rows[r].dtype[c]));
      if (bytes != 0) ranges.push_back({rows[r].address[c], rows[r].address[c] + bytes, r});
    }
    const auto groups = static_cast<uint64_t>(rows[r].numel / kGroup);
    for (const uint64_t scale : rows[r].scale) {
      if (scale != 0 && groups != 0) ranges.push_back({scale, scale + groups, r});
    }
    if (rows[r].counter != 0) ranges.push_back({rows[r].counter, rows[r].counter + sizeof(float), r});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  size_t widest = 0;  // the range that reaches furthest among those before
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[widest].end) {
      hosts[ranges[i].row].overlapping = hosts[ranges[widest].row].overlapping = true;
    }
    if (ranges[i].end > ranges[widest].end) widest = i;
  }
}

}  // namespace fused_optim
