// Reads the numbers of elements of some rows, and prints how the CUDA backend cuts them up: a line for each
// piece of the reduce phase in the order of blocks (row, first element, elements, where its sums go), for
// each total (row, first sums, pieces) and for each row of a rule that sums its direction (row, first sum,
// sums).
#include "cuda/layout.h"

#include <cstdio>
#include <cstdlib>

using namespace fused_optim;

namespace {

template <class... R>
int rule_with_direction(RuleList<R...>) {
  int found = -1, rule = 0;
  ((found = R::kHasDirection && !R::kKeepsDirection ? rule : found, ++rule), ...);
  return found;
}

template <class Value>
const Value* at(const TableLayout& layout, size_t offset) {
  return reinterpret_cast<const Value*>(reinterpret_cast<const unsigned char*>(layout.words.data()) + offset);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<Row> rows;
  for (int i = 1; i < count; ++i) {
    Row row{};
    row.numel = std::atoll(arguments[i]);
    row.rule = rule_with_direction(Rules{});
    row.dtype[kParam] = DType::float32;
    rows.push_back(row);
  }
  const TableLayout layout = lay_out(rows, 1);
  const auto* pieces = at<Piece>(layout, layout.pieces);
  for (int i = 0; i < layout.piece_count + layout.small_count; ++i) {
    std::printf("%s %d %lld %d %d\n", i < layout.piece_count ? "block" : "warp", pieces[i].row,
                static_cast<long long>(pieces[i].begin), pieces[i].count, pieces[i].out);
  }
  for (int i = 0; i < layout.total_count; ++i) {
    const Pieces& total = at<Pieces>(layout, layout.totals)[i];
    std::printf("total %d %d %d\n", total.row, total.first, total.count);
  }
  for (int i = 0; i < layout.direction_count; ++i) {
    const DirectionRow& row = at<DirectionRow>(layout, layout.directions)[i];
    std::printf("direction %d %d %d\n", row.row, row.first, row.count);
  }
  std::printf("bytes %zu\n", layout.bytes);
}
