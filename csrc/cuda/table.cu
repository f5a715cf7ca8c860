#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/table.h"

namespace fused_optim {

namespace {

// A table of a graph, which the graph lets go of when it is destroyed, in a thread of the driver's in which
// CUDA must not be called.
struct GraphTable {
  std::unique_ptr<Table> table;
  std::atomic<bool> released{false};

  static void release(void* self) { static_cast<GraphTable*>(self)->released.store(true); }
};

// Of this process; never destroyed, since graphs may be destroyed after everything else.
struct GraphTables {
  std::mutex mutex;
  std::vector<std::unique_ptr<GraphTable>> tables;
};

GraphTables& graph_tables() {
  static auto* const all = new GraphTables;
  return *all;
}

}  // namespace

void free_tables_of_graphs() {
  std::vector<std::unique_ptr<GraphTable>> released;
  GraphTables& all = graph_tables();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto first = std::partition(all.tables.begin(), all.tables.end(),
                                      [](const auto& one) { return !one->released.load(); });
    std::move(first, all.tables.end(), std::back_inserter(released));
    all.tables.erase(first, all.tables.end());
  }
}

Table::Table(int device, size_t bytes, const MakeRoom& make_room) : device_(device) {
  const DeviceGuard guard(device);
  check(guard.error(), "choosing the device");
  const RelaxedCapture relaxed;
  const auto allocate = [&] { return cudaMalloc(reinterpret_cast<void**>(&base), bytes); };
  cudaError_t error = allocate();
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    make_room();
    error = allocate();
  }
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw std::runtime_error(
        "fused_optim: no memory on CUDA device " + std::to_string(device) + " for " + std::to_string(bytes) +
        " bytes that tell the kernels where the parameters lie; nothing has changed. Free "
        "some, and before a capture call torch.cuda.empty_cache()");
  }
  check(error, "allocating the table");
}

Table::~Table() {
  const DeviceGuard guard(device_);
  if (guard.error() != cudaSuccess) return;  // the process ends: the driver has gone first
  const RelaxedCapture relaxed;
  cudaFree(base);  // waits for what still reads it
}

TableWriter::TableWriter(int device, const TableLayout& layout, MakeRoom make_room)
    : device_(device),
      layout_(layout),
      make_room_(std::move(make_room)),
      has_large_patches_(has_large_patches()),
      words_(layout.words) {}

std::unique_ptr<Table> TableWriter::make_table() const {
  return std::make_unique<Table>(device_, layout_.bytes, make_room_);
}

void TableWriter::write(const std::vector<Row>& rows, const std::vector<GroupHyper>& groups,
                        const std::vector<HyperTensors>& tensors) {
  constexpr size_t kUsed =
      offsetof(Row, stochastic) + sizeof(bool);  // without the padding behind: it may be anything
  for (size_t r = 0; r < layout_.row_count; ++r) {
    unsigned char* at = bytes(layout_.rows + r * sizeof(Row));
    std::memcpy(at, &rows[r], kUsed);
    // An inactive row's addresses may be stale: the device never sees them.
    if (!rows[r].active) std::memset(at, 0, offsetof(Row, first));
  }
  for (size_t g = 0; g < layout_.group_count; ++g) {
    const CudaGroup group{groups[g], tensors[g]};
    std::memcpy(bytes(layout_.groups + g * sizeof(CudaGroup)), &group,
                offsetof(CudaGroup, tensors.dtype) + kMaxHyper);
  }
}

template <int kWords>
void TableWriter::patch(void (*kernel)(PatchWords<kWords>), Table& table, cudaStream_t stream) {
  constexpr int kPatchThreads = 256;
  auto words = std::make_unique<PatchWords<kWords>>();
  words->table = reinterpret_cast<uint32_t*>(table.base);
  for (size_t begin = 0; begin < changed_.size(); begin += kWords) {
    words->count = static_cast<int32_t>(std::min<size_t>(kWords, changed_.size() - begin));
    for (int32_t i = 0; i < words->count; ++i) {
      words->offset[i] = changed_[begin + static_cast<size_t>(i)];
      words->value[i] = words_[words->offset[i]];
    }
    const int blocks = (words->count + kPatchThreads - 1) / kPatchThreads;
    launch("the refresh of the table", kernel, blocks, kPatchThreads, stream, *words);
  }
}

// Beside all streams: it is there, on the device, before this returns.
void TableWriter::upload(const Table& table) const {
  const RelaxedCapture relaxed;
  const SideStream side;
  check(cudaMemcpyAsync(table.base, words_.data(), words_.size() * sizeof(uint32_t), cudaMemcpyHostToDevice,
                        side),
        "the upload of the table");
  // The sums of a row that is not active are read and not used.
  check(cudaMemsetAsync(table.base + layout_.sums, 0, layout_.sums_bytes, side), "clearing the table");
  check(cudaStreamSynchronize(side), "the upload of the table");
}

void TableWriter::send(Table& table, cudaStream_t stream) {
  changed_.clear();
  std::vector<uint32_t> mirror;  // until everything is on its way, nothing is known of the table
  mirror.swap(table.mirror);
  if (mirror.empty()) {
    // What a step that has failed has launched may still read it.
    if (table.used) check(cudaDeviceSynchronize(), "waiting for the step that has failed");
    upload(table);
    mirror = words_;
  }
  table.used = true;
  const size_t end = layout_.changing_bytes / sizeof(uint32_t);
  constexpr size_t kStride = 64;  // words compared at a time
  for (size_t begin = 0; begin < end; begin += kStride) {
    const size_t stop = std::min(end, begin + kStride);
    if (std::equal(words_.begin() + static_cast<ptrdiff_t>(begin),
                   words_.begin() + static_cast<ptrdiff_t>(stop),
                   mirror.begin() + static_cast<ptrdiff_t>(begin))) {
      continue;
    }
    for (size_t i = begin; i < stop; ++i) {
      if (words_[i] != mirror[i]) changed_.push_back(static_cast<uint32_t>(i));
    }
  }
  // Launches, however many words have changed: for a copy from the host's memory, the driver may wait until
  // the stream comes to it.
  if (has_large_patches_ && changed_.size() > kPatchWordsSmall) {
    patch<kPatchWords>(large_patch_kernel(), table, stream);
  } else {
    patch<kPatchWordsSmall>(patch_kernel<kPatchWordsSmall>, table, stream);
  }
  std::copy_n(words_.begin(), end, mirror.begin());
  table.mirror.swap(mirror);
}

const Table& TableWriter::table_for_replays(cudaStream_t stream) const {
  free_tables_of_graphs();
  auto kept = std::make_unique<GraphTable>();
  kept->table = make_table();
  upload(*kept->table);
  GraphTable* const self = kept.get();
  {
    GraphTables& all = graph_tables();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.tables.push_back(std::move(kept));
  }
  try {
    release_with_graph(stream, GraphTable::release, self);
  } catch (...) {
    self->released = true;
    throw;
  }
  return *self->table;
}

}  // namespace fused_optim
