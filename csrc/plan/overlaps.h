// Two rows of one launch must not write the same memory.
#pragma once

#include <vector>

#include "plan/rows.h"
#include "row.h"

namespace fused_optim {

// Says of each row whether another active one writes some of its memory.
void find_overlaps(const std::vector<Row>& rows, std::vector<HostRow>& hosts);

}  // namespace fused_optim
