#include <algorithm>
#include <cstddef>
#include <cstring>

#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/table.h"

namespace fused_optim {

// What changes at a step is sent by up to so many launches, more by a copy.
constexpr size_t kMostPatches = 8;

Table::Table(int device, size_t bytes) : device_(device) {
  const DeviceGuard guard(device);
  check(guard.error(), "choosing the device");
  const RelaxedCapture relaxed;
  check(cudaMalloc(reinterpret_cast<void**>(&base), bytes), "allocating the table");
}

Table::~Table() {
  const DeviceGuard guard(device_);
  if (guard.error() != cudaSuccess) return;  // the process ends: the driver has gone first
  const RelaxedCapture relaxed;
  cudaFree(base);  // waits for what still reads it
}

TableWriter::TableWriter(int device, const TableLayout& layout)
    : device_(device), layout_(layout), has_large_patches_(has_large_patches()), words_(layout.words) {
  check(cudaEventCreateWithFlags(&uploaded_, cudaEventDisableTiming), "creating an event");
}

TableWriter::~TableWriter() {
  const DeviceGuard guard(device_);
  const RelaxedCapture relaxed;
  if (uploaded_ != nullptr) cudaEventDestroy(uploaded_);
}

void TableWriter::write(const std::vector<Row>& rows, const std::vector<GroupHyper>& groups,
                        const std::vector<HyperTensors>& tensors) {
  if (uploading_) {
    const RelaxedCapture relaxed;
    check(cudaEventSynchronize(uploaded_), "waiting for the upload of the table");
  }
  uploading_ = false;
  constexpr size_t kUsed =
      offsetof(Row, has_trust_ratio) + sizeof(bool);  // without the padding behind: it may be anything
  for (size_t r = 0; r < layout_.row_count; ++r) {
    unsigned char* at = bytes(layout_.rows + r * sizeof(Row));
    std::memcpy(at, &rows[r], kUsed);
    // An inactive row's addresses may be stale: the device never sees them.
    if (!rows[r].active) std::memset(at, 0, sizeof rows[r].address);
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

void TableWriter::send(Table& table, cudaStream_t stream) {
  changed_.clear();
  std::vector<uint32_t> mirror;  // until everything is on its way, nothing is known of the table
  mirror.swap(table.mirror);
  const bool fresh = mirror.empty();
  const size_t end = fresh ? words_.size() : layout_.changing_bytes / sizeof(uint32_t);
  constexpr size_t kStride = 64;  // words compared at a time
  for (size_t begin = 0; begin < end && !fresh; begin += kStride) {
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
  const size_t limit = has_large_patches_ ? kPatchWords : kPatchWordsSmall;
  if (fresh) {
    // The sums of a row that is not active are read and not used.
    check(cudaMemsetAsync(table.base + layout_.sums, 0, layout_.sums_bytes, stream), "clearing the table");
  }
  if (fresh || changed_.size() > kMostPatches * limit) {
    // The driver may wait until the stream comes to the copy, or, where the device reads the host's pages,
    // copy when it does: nothing for every step, and words_ must not change until then.
    check(cudaMemcpyAsync(table.base, words_.data(), end * sizeof(uint32_t), cudaMemcpyHostToDevice, stream),
          "the upload of the table");
    check(cudaEventRecord(uploaded_, stream), "recording the upload of the table");
    uploading_ = true;
  } else if (has_large_patches_) {
    patch<kPatchWords>(large_patch_kernel(), table, stream);
  } else {
    patch<kPatchWordsSmall>(patch_kernel<kPatchWordsSmall>, table, stream);
  }
  mirror.resize(words_.size());
  std::copy_n(words_.begin(), end, mirror.begin());
  table.mirror.swap(mirror);
}

std::unique_ptr<Table> TableWriter::upload() {
  auto table = std::make_unique<Table>(device_, layout_.bytes);
  const RelaxedCapture relaxed;
  const SideStream side;
  check(cudaMemcpyAsync(table->base, words_.data(), words_.size() * sizeof(uint32_t), cudaMemcpyHostToDevice,
                        side),
        "the upload of the table");
  check(cudaMemsetAsync(table->base + layout_.sums, 0, layout_.sums_bytes, side), "clearing the table");
  check(cudaStreamSynchronize(side), "the upload of the table");
  return table;
}

}  // namespace fused_optim
