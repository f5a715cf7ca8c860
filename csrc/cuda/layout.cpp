#include "cuda/layout.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

namespace fused_optim {
namespace {

// Offsets of arrays in one allocation.
class Arena {
 public:
  template <class Value>
  size_t place(size_t count) {
    const size_t offset = size_;
    size_ += (count * sizeof(Value) + 255) / 256 * 256;
    return offset;
  }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

template <class Value>
void put(std::vector<uint32_t>& words, size_t offset, const std::vector<Value>& values) {
  if (values.empty()) return;
  std::memcpy(reinterpret_cast<unsigned char*>(words.data()) + offset, values.data(),
              values.size() * sizeof(Value));
}

template <class... R>
bool has_direction_of(RuleList<R...>, int rule) {
  static constexpr bool table[] = {R::kHasDirection...};
  return table[rule];
}

template <class... R>
bool keeps_direction_of(RuleList<R...>, int rule) {
  static constexpr bool table[] = {R::kKeepsDirection...};
  return table[rule];
}

bool measures(int rule) { return has_direction_of(Rules{}, rule) && !keeps_direction_of(Rules{}, rule); }

// A number for each bucket, in the order in which they are launched. The rows of a rule and a compute type
// are one, whether they draw random words or not; but a sum's order would depend on what other rows do.
int bucket_of(const Row& row) {
  const bool in_double = computes_in_double(row.dtype[kParam]);
  const bool apart = measures(row.rule) && row.draws && !in_double;
  return ((in_double ? Rules::kCount : 0) + row.rule) * 2 + (apart ? 1 : 0);
}

// The elements of a row's pieces, but for its last.
int64_t piece_length(int64_t numel) {
  constexpr int64_t kMost = int64_t{kMostPieces} * kChunk;
  return std::max<int64_t>((numel + kMost - 1) / kMost, 1) * kChunk;
}

}  // namespace

TableLayout lay_out(const std::vector<Row>& rows, size_t group_count) {
  TableLayout layout;
  layout.row_count = rows.size();
  layout.group_count = group_count;
  Arena arena;
  layout.rows = arena.place<Row>(layout.row_count);
  layout.groups = arena.place<CudaGroup>(group_count);
  layout.changing_bytes = arena.size();

  std::vector<std::vector<Extent>> extents;
  std::vector<std::vector<int32_t>> first_extents;
  std::vector<DirectionRow> directions;
  int32_t direction_sums = 0;
  std::map<int, Kernel> kernels;  // by bucket_of, in the order of the launches
  for (const Row& row : rows) {
    Kernel& kernel = kernels[bucket_of(row)];
    kernel = {row.rule, computes_in_double(row.dtype[kParam]), kernel.draws || row.draws};
  }
  for (const auto& [bucket, kernel] : kernels) {
    std::vector<Extent> list;
    std::vector<int32_t> first;
    int64_t tiles = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      const Row& row = rows[r];
      if (bucket_of(row) != bucket) continue;
      const int64_t end = tiles + (row.numel + kTile - 1) / kTile;
      const int32_t first_sum = direction_sums;
      if (measures(row.rule)) {
        if (row.numel != 0) {
          direction_sums += static_cast<int32_t>((end - 1) / kWarpsPerBlock - tiles / kWarpsPerBlock + 1);
        }
        directions.push_back({static_cast<int32_t>(r), first_sum, direction_sums - first_sum});
      }
      if (row.numel == 0) continue;
      // Blocks whose first tile is in this row.
      for (int64_t tile = static_cast<int64_t>(first.size()) * kWarpsPerBlock; tile < end;
           tile += kWarpsPerBlock) {
        first.push_back(static_cast<int32_t>(list.size()));
      }
      list.push_back({tiles, static_cast<int32_t>(r), first_sum});
      tiles = end;
    }
    if (list.empty()) continue;
    layout.keeps_directions = layout.keeps_directions || keeps_direction_of(Rules{}, kernel.rule);
    list.push_back({tiles, -1, 0});
    for (int i = 1; i < kWarpsPerBlock; ++i) list.push_back({std::numeric_limits<int64_t>::max(), -1, 0});
    layout.buckets.push_back({kernel, static_cast<int64_t>(first.size()), arena.place<Extent>(list.size()),
                              arena.place<int32_t>(first.size()), has_direction_of(Rules{}, kernel.rule)});
    extents.push_back(std::move(list));
    first_extents.push_back(std::move(first));
  }

  std::vector<Piece> pieces, small;
  std::vector<Pieces> totals;
  auto next = static_cast<int32_t>(layout.row_count);
  for (size_t r = 0; r < rows.size(); ++r) {
    const auto row = static_cast<int32_t>(r);
    const int64_t numel = rows[r].numel, length = piece_length(numel);
    const auto count = static_cast<int32_t>((numel + length - 1) / length);
    const auto piece = [&](int64_t begin, int32_t out) -> Piece {
      return {begin, static_cast<int32_t>(std::min(length, numel - begin)), row, rows[r].group, out};
    };
    if (numel <= kSummedByWarp) {
      small.push_back(piece(0, row));
    } else if (count == 1) {
      pieces.push_back(piece(0, row));
    } else {
      totals.push_back({row, next, count});
      for (int32_t i = 0; i < count; ++i) pieces.push_back(piece(i * length, next++));
    }
  }
  layout.piece_count = static_cast<int32_t>(pieces.size());
  layout.small_count = static_cast<int32_t>(small.size());
  layout.total_count = static_cast<int32_t>(totals.size());
  pieces.insert(pieces.end(), small.begin(), small.end());
  layout.pieces = arena.place<Piece>(pieces.size());
  layout.totals = arena.place<Pieces>(totals.size());
  layout.direction_count = static_cast<int32_t>(directions.size());
  layout.directions = arena.place<DirectionRow>(directions.size());

  layout.words.assign(arena.size() / sizeof(uint32_t), 0);
  for (size_t b = 0; b < layout.buckets.size(); ++b) {
    put(layout.words, layout.buckets[b].extents, extents[b]);
    put(layout.words, layout.buckets[b].first_extent, first_extents[b]);
  }
  put(layout.words, layout.pieces, pieces);
  put(layout.words, layout.totals, totals);
  put(layout.words, layout.directions, directions);

  // Only kernels touch what follows.
  layout.sums = arena.place<Sums>(static_cast<size_t>(next));
  layout.sums_bytes = arena.size() - layout.sums;
  layout.records = arena.place<ScalarsRecord>(layout.row_count);
  layout.control = arena.place<Control>(1);
  layout.direction_sums = arena.place<DirectionSums>(static_cast<size_t>(direction_sums));
  layout.bytes = arena.size();
  return layout;
}

}  // namespace fused_optim
