// The host side of the CUDA backend: tables, their refresh, and the launches of a step.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "cuda/device.h"
#include "cuda/phases.h"

namespace fused_optim {
namespace {

std::atomic<uint64_t> launches{0};

// What changes at a step is sent by up to so many launches, more by a copy.
constexpr size_t kMostPatches = 8;

// An error is thrown once: what is left of it is cleared, as far as CUDA lets it be.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(
      std::string("fused_optim: CUDA error in ") + what + ": " + cudaGetErrorName(error) + " (" +
      cudaGetErrorString(error) +
      "). It may come from earlier work on the device; the parameters and states of this step "
      "are undefined");
}

template <class... P, class... A>
void launch(const char* phase, void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream,
            const A&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  launches.fetch_add(1, std::memory_order_relaxed);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), phase);
}

// The driver's functions, through the runtime: the module links to no driver.
using GetContext = int (*)(void** context);
using SetContext = int (*)(void* context);

template <class Function>
Function find_in_driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 11080, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(found)
                                                                       : nullptr;
}

// Makes a device current in this thread. Afterwards the context that was current before is so again, or none
// where there was none: cudaSetDevice to the device before would create a context on it, which takes hundreds
// of megabytes of a GPU that this process may have nothing to do with.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(enter(device)) {}
  ~DeviceGuard() {
    if (entered_) set()(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  static GetContext get() {
    static const auto function = find_in_driver<GetContext>("cuCtxGetCurrent");
    return function;
  }
  static SetContext set() {
    static const auto function = find_in_driver<SetContext>("cuCtxSetCurrent");
    return function;
  }

  cudaError_t enter(int device) {
    entered_ = get() != nullptr && set() != nullptr && get()(&before_) == 0;
    if (!entered_) return cudaErrorInitializationError;  // no driver, or it has gone before this process
    return cudaSetDevice(device);
  }

  void* before_ = nullptr;
  bool entered_ = false;
  cudaError_t error_;
};

// Allocating and freeing is no work on a stream: it must not spoil a capture that goes on in this thread.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

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

// One device allocation and what the host knows of its front part.
struct Table {
  unsigned char* base = nullptr;
  std::vector<uint32_t> mirror;  // empty: nothing has been sent yet

  Table(int device, size_t bytes) : device_(device) {
    const DeviceGuard guard(device);
    check(guard.error(), "choosing the device");
    const RelaxedCapture relaxed;
    check(cudaMalloc(reinterpret_cast<void**>(&base), bytes), "allocating the table");
  }
  ~Table() {
    const DeviceGuard guard(device_);
    if (guard.error() != cudaSuccess) return;  // the process ends: the driver has gone first
    const RelaxedCapture relaxed;
    cudaFree(base);  // waits for what still reads it
  }
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  template <class Value>
  Value* at(size_t offset) const {
    return reinterpret_cast<Value*>(base + offset);
  }

 private:
  int device_;
};

template <class... R>
int first_state_of(RuleList<R...>, int rule) {
  static constexpr int table[] = {kFirstState + per_tensor_states<R>()...};
  return table[rule];
}

bool has_large_patches() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
}

// A stream that has nothing to do with any other, and so with no capture.
class SideStream {
 public:
  SideStream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream"); }
  ~SideStream() { cudaStreamDestroy(stream_); }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

bool is_capturing(int device, cudaStream_t stream) {
  const DeviceGuard guard(device);  // a thread without a context would get one on device 0
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

class CudaPhasesOfDevice final : public CudaPhases {
 public:
  CudaPhasesOfDevice(int device, const std::vector<Row>& rows, std::vector<size_t> own,
                     const std::vector<GroupHyper>& groups, const std::vector<HyperTensors>& tensors)
      : device_(device),
        own_(std::move(own)),
        hypers_(groups),
        tensors_(tensors),
        row_count_(own_.size()),
        group_count_(groups.size()),
        has_large_patches_(has_large_patches()) {
    for (const size_t r : own_) own_rows_.push_back(rows[r]);
    const DeviceGuard guard(device);
    check(guard.error(), "choosing the device");
    lay_out(own_rows_);
    live_ = std::make_unique<Table>(device_, arena_.size());
    check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "creating an event");
    check(cudaEventCreateWithFlags(&uploaded_, cudaEventDisableTiming), "creating an event");
  }

  ~CudaPhasesOfDevice() override {
    const DeviceGuard guard(device_);
    const RelaxedCapture relaxed;
    if (done_ != nullptr) cudaEventDestroy(done_);
    if (uploaded_ != nullptr) cudaEventDestroy(uploaded_);
  }

  int device() const override { return device_; }
  void work_on(void* stream) override { stream_ = static_cast<cudaStream_t>(stream); }
  bool captured() const override { return is_capturing(device_, stream_); }

  void collect(const std::vector<Row>& rows) override {
    active_ = reduced_ = measures_ = false;
    for (size_t i = 0; i < own_.size(); ++i) {
      own_rows_[i] = rows[own_[i]];
      active_ = active_ || own_rows_[i].active;
    }
  }

  bool reduce(const Step& plan_step, double* sum) override {
    const CudaStep step = step_of(plan_step);
    if (!takes_part(step)) return true;
    {
      const DeviceGuard guard(device_);
      check(guard.error(), "choosing the device");
      if (captured()) {
        throw std::runtime_error(
            "a global norm over several devices, or over parameters that the eager path steps, cannot be "
            "captured: "
            "it is added on the host");
      }
      refresh();
      if (step.exchanged != 0) clear_totals(*live_);
      launch_reduce(*live_, step);
      if (step.exchanged != 0) {
        copy_totals(reinterpret_cast<void*>(step.exchanged), live_->at<Sums>(sums_));
      } else {
        *sum += grad_sq(step);
      }
    }
    reduced_ = true;
    double exchanged = 0;
    if (step.exchanged != 0 && !plan_step.exchange(nullptr, device_, &exchanged)) return false;
    *sum += exchanged;
    return true;
  }

  bool apply(const Step& plan_step) override {
    const CudaStep step = step_of(plan_step);
    if (!takes_part(step)) return true;
    const DeviceGuard guard(device_);
    check(guard.error(), "choosing the device");
    const bool capturing = captured();
    const Table* table = live_.get();
    if (capturing) {
      table = &table_for_replays();
    } else {
      refresh();
    }
    const bool reduces = step.options.clip == Clip::global_norm || step.options.clip == Clip::norm ||
                         step.options.finds_inf ||
                         std::any_of(hypers_.begin(), hypers_.end(), [](const GroupHyper& group) {
                           return (group.needs & ~uint64_t{kNeedsDirectionSq}) != 0;
                         });
    if (reduces && !step.reduced) launch_reduce(*table, step);
    if (step.reduced && step.exchanged != 0) {
      copy_totals(table->at<Sums>(sums_), reinterpret_cast<const void*>(step.exchanged));
    }
    measures_ = step.measured != 0;
    if (!launch_update(*table, step, reduces, plan_step.exchange)) return false;
    if (capturing) return true;
    check(cudaEventRecord(done_, stream_), "recording the step's end");
    recorded_ = true;
    recorded_on_ = stream_;
    return true;
  }

  void add_norms(std::vector<RowNorms>* norms) const override {
    for (size_t i = 0; measures_ && i < own_.size(); ++i) {
      const Row& row = own_rows_[i];
      if (row.active && hypers_[static_cast<size_t>(row.group)].needs != 0) {
        norms->push_back({own_[i], {0, 0, 0}});
      }
    }
  }

 private:
  struct BucketPlan {
    int rule;
    bool in_double;
    int64_t blocks;
    size_t extents, first_extent;
    int64_t first_tile_sums;  // of its tiles among those of all buckets; -1: it has none
  };

  CudaStep step_of(const Step& step) const {
    CudaStep out{step.of_device(device_)};
    out.options = step.options;
    out.options.finds_inf = out.non_finite != 0;
    out.global_norm_known = step.global_norm.has_value();
    out.global_norm = step.global_norm.value_or(0);
    out.reduced = reduced_;
    return out;
  }

  // Without an active row there is nothing to do, unless other processes wait for an exchange.
  bool takes_part(const CudaStep& step) const { return active_ || step.exchanged != 0; }

  // For a caller that wants to know before the step goes on.
  double grad_sq(const CudaStep& step) const {
    launch("the reduce phase", grad_sq_kernel, 1, kThreads, stream_, prepare_table(*live_), step.non_finite);
    double grad_sq = 0;
    check(cudaMemcpyAsync(&grad_sq, &live_->at<Control>(control_)->grad_sq, sizeof grad_sq,
                          cudaMemcpyDeviceToHost, stream_),
          "reading the global norm");
    check(cudaStreamSynchronize(stream_), "reading the global norm");
    return grad_sq;
  }

  // Decides where everything lies, and writes what never changes.
  void lay_out(const std::vector<Row>& rows) {
    rows_ = arena_.place<Row>(row_count_);
    groups_ = arena_.place<CudaGroup>(group_count_);
    changing_bytes_ = arena_.size();

    std::vector<std::vector<Extent>> extents;
    std::vector<std::vector<int32_t>> first_extents;
    std::vector<DirectionRow> directions;
    int64_t tile_sums = 0;
    for (const bool in_double : {false, true}) {
      for (int rule = 0; rule < Rules::kCount; ++rule) {
        std::vector<Extent> list;
        std::vector<int32_t> first;
        int64_t tiles = 0;
        const bool has_direction = accumulate_kernel_of(rule, in_double) != nullptr;
        for (size_t r = 0; r < rows.size(); ++r) {
          const Row& row = rows[r];
          if (row.rule != rule || computes_in_double(row.dtype[kParam]) != in_double) continue;
          const int64_t end = tiles + (row.numel + kTile - 1) / kTile;
          if (has_direction) {
            directions.push_back({tile_sums + tiles, end - tiles, static_cast<int64_t>(r)});
          }
          if (row.numel == 0) continue;
          // Blocks whose first tile is in this row.
          for (int64_t tile = static_cast<int64_t>(first.size()) * kWarpsPerBlock; tile < end;
               tile += kWarpsPerBlock) {
            first.push_back(static_cast<int32_t>(list.size()));
          }
          list.push_back({tiles, static_cast<int64_t>(r)});
          tiles = end;
        }
        if (list.empty()) continue;
        list.push_back({tiles, -1});
        for (int i = 1; i < kWarpsPerBlock; ++i) list.push_back({std::numeric_limits<int64_t>::max(), -1});
        buckets_.push_back({rule, in_double, static_cast<int64_t>(first.size()),
                            arena_.place<Extent>(list.size()), arena_.place<int32_t>(first.size()),
                            has_direction ? tile_sums : -1});
        if (has_direction) tile_sums += tiles;
        extents.push_back(std::move(list));
        first_extents.push_back(std::move(first));
      }
    }

    std::vector<Piece> pieces;
    std::vector<Pieces> totals;
    std::vector<int32_t> small;
    auto next = static_cast<int32_t>(row_count_);
    for (size_t r = 0; r < rows.size(); ++r) {
      const auto row = static_cast<int32_t>(r);
      const auto count = static_cast<int32_t>((rows[r].numel + kChunk - 1) / kChunk);
      if (rows[r].numel <= kSummedByWarp) {
        small.push_back(row);
      } else if (count == 1) {
        pieces.push_back({0, row, row});
      } else {
        totals.push_back({row, next, count});
        for (int32_t i = 0; i < count; ++i) pieces.push_back({static_cast<int64_t>(i) * kChunk, row, next++});
      }
    }
    piece_count_ = static_cast<int32_t>(pieces.size());
    small_count_ = static_cast<int32_t>(small.size());
    total_count_ = static_cast<int32_t>(totals.size());
    pieces_ = arena_.place<Piece>(pieces.size());
    totals_ = arena_.place<Pieces>(totals.size());
    small_ = arena_.place<int32_t>(small.size());
    direction_count_ = static_cast<int64_t>(directions.size());
    directions_ = arena_.place<DirectionRow>(directions.size());

    words_.assign(arena_.size() / sizeof(uint32_t), 0);
    for (size_t b = 0; b < buckets_.size(); ++b) {
      put(buckets_[b].extents, extents[b]);
      put(buckets_[b].first_extent, first_extents[b]);
    }
    put(pieces_, pieces);
    put(totals_, totals);
    put(small_, small);
    put(directions_, directions);

    // Only kernels touch what follows.
    sums_ = arena_.place<Sums>(static_cast<size_t>(next));
    sums_bytes_ = arena_.size() - sums_;
    records_ = arena_.place<ScalarsRecord>(row_count_);
    control_ = arena_.place<Control>(1);
    tile_sums_ = arena_.place<TileSums>(static_cast<size_t>(tile_sums));
  }

  unsigned char* bytes(size_t offset) { return reinterpret_cast<unsigned char*>(words_.data()) + offset; }

  template <class Value>
  void put(size_t offset, const std::vector<Value>& values) {
    if (!values.empty()) std::memcpy(bytes(offset), values.data(), values.size() * sizeof(Value));
  }

  // What the table should hold.
  void write() {
    if (uploading_) {
      const RelaxedCapture relaxed;
      check(cudaEventSynchronize(uploaded_), "waiting for the upload of the table");
    }
    uploading_ = false;
    constexpr size_t kUsed =
        offsetof(Row, has_trust_ratio) + sizeof(bool);  // without the padding behind: it may be anything
    for (size_t r = 0; r < row_count_; ++r) {
      unsigned char* at = bytes(rows_ + r * sizeof(Row));
      std::memcpy(at, &own_rows_[r], kUsed);
      // An inactive row's addresses may be stale: the device never sees them.
      if (!own_rows_[r].active) std::memset(at, 0, sizeof own_rows_[r].address);
    }
    for (size_t g = 0; g < group_count_; ++g) {
      const CudaGroup group{hypers_[g], tensors_[g]};
      std::memcpy(bytes(groups_ + g * sizeof(CudaGroup)), &group,
                  offsetof(CudaGroup, tensors.dtype) + kMaxHyper);
    }
  }

  template <int kWords>
  void patch(void (*kernel)(PatchWords<kWords>), Table& table, const std::vector<uint32_t>& changed) {
    constexpr int kPatchThreads = 256;
    auto words = std::make_unique<PatchWords<kWords>>();
    words->table = reinterpret_cast<uint32_t*>(table.base);
    for (size_t begin = 0; begin < changed.size(); begin += kWords) {
      words->count = static_cast<int32_t>(std::min<size_t>(kWords, changed.size() - begin));
      for (int32_t i = 0; i < words->count; ++i) {
        words->offset[i] = changed[begin + static_cast<size_t>(i)];
        words->value[i] = words_[words->offset[i]];
      }
      const int blocks = (words->count + kPatchThreads - 1) / kPatchThreads;
      launch("the refresh of the table", kernel, blocks, kPatchThreads, stream_, *words);
    }
  }

  // Makes the table on the device equal to words_.
  void send(Table& table) {
    changed_.clear();
    std::vector<uint32_t> mirror;  // until everything is on its way, nothing is known of the table
    mirror.swap(table.mirror);
    const bool fresh = mirror.empty();
    const size_t end = fresh ? words_.size() : changing_bytes_ / sizeof(uint32_t);
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
      check(cudaMemsetAsync(table.base + sums_, 0, sums_bytes_, stream_), "clearing the table");
    }
    if (fresh || changed_.size() > kMostPatches * limit) {
      // The driver may wait until the stream comes to the copy, or, where the device reads the host's pages,
      // copy when it does: nothing for every step, and words_ must not change until then.
      check(
          cudaMemcpyAsync(table.base, words_.data(), end * sizeof(uint32_t), cudaMemcpyHostToDevice, stream_),
          "the upload of the table");
      check(cudaEventRecord(uploaded_, stream_), "recording the upload of the table");
      uploading_ = true;
    } else if (has_large_patches_) {
      patch<kPatchWords>(large_patch_kernel(), table, changed_);
    } else {
      patch<kPatchWordsSmall>(patch_kernel<kPatchWordsSmall>, table, changed_);
    }
    mirror.resize(words_.size());
    std::copy_n(words_.begin(), end, mirror.begin());
    table.mirror.swap(mirror);
  }

  void refresh() {
    cudaGetLastError();  // an earlier error that was not read is not this step's
    if (recorded_on_ != stream_ && recorded_) {
      check(cudaStreamWaitEvent(stream_, done_, 0), "waiting for the last step's stream");
    }
    write();
    send(*live_);
  }

  // A table of this step for the replays of the graph that is being captured. A later step would change the
  // live one under them; and the capture may yet fail, so that what it was told was never done. Nothing of
  // it enters the graph: it is there, on the device, before this returns.
  const Table& table_for_replays() {
    cudaGetLastError();
    auto table = std::make_unique<Table>(device_, arena_.size());
    write();
    const RelaxedCapture relaxed;
    const SideStream side;
    check(cudaMemcpyAsync(table->base, words_.data(), words_.size() * sizeof(uint32_t),
                          cudaMemcpyHostToDevice, side),
          "the upload of the table");
    check(cudaMemsetAsync(table->base + sums_, 0, sums_bytes_, side), "clearing the table");
    check(cudaStreamSynchronize(side), "the upload of the table");
    captured_.push_back(std::move(table));
    return *captured_.back();
  }

  PrepareTable prepare_table(const Table& table) const {
    return {table.at<Row>(rows_),        table.at<CudaGroup>(groups_),
            table.at<Sums>(sums_),       table.at<ScalarsRecord>(records_),
            table.at<Control>(control_), static_cast<int32_t>(row_count_)};
  }

  void launch_reduce(const Table& table, const CudaStep& step) const {
    const ReduceTable reduce{table.at<Row>(rows_),
                             table.at<CudaGroup>(groups_),
                             table.at<Piece>(pieces_),
                             table.at<int32_t>(small_),
                             piece_count_,
                             small_count_,
                             table.at<Sums>(sums_)};
    const int64_t blocks = piece_count_ + (small_count_ + kWarpsPerBlock - 1) / kWarpsPerBlock;
    launch("the reduce phase", reduce_kernel, blocks, kThreads, stream_, reduce, step);
    launch("the reduce phase", total_kernel, total_count_, kThreads, stream_, table.at<const Pieces>(totals_),
           table.at<const Row>(rows_), table.at<Sums>(sums_));
  }

  void clear_totals(const Table& table) const {
    check(cudaMemsetAsync(table.at<Sums>(sums_), 0, row_count_ * sizeof(Sums), stream_),
          "clearing the norms");
  }

  void copy_totals(void* to, const void* from) const {
    check(cudaMemcpyAsync(to, from, row_count_ * sizeof(Sums), cudaMemcpyDeviceToDevice, stream_),
          "copying the norms");
  }

  Bucket bucket(const Table& table, const BucketPlan& plan, bool backwards) const {
    TileSums* sums =
        plan.first_tile_sums < 0 ? nullptr : table.at<TileSums>(tile_sums_) + plan.first_tile_sums;
    return {table.at<Extent>(plan.extents),
            table.at<int32_t>(plan.first_extent),
            table.at<Row>(rows_),
            table.at<ScalarsRecord>(records_),
            table.at<Control>(control_),
            sums,
            first_state_of(Rules{}, plan.rule),
            backwards};
  }

  // Passes alternate direction: the end of the last one is still in the cache. False: the exchange has
  // failed.
  bool launch_update(const Table& table, const CudaStep& step, bool reduces, const Exchange& exchange) const {
    const auto blocks = static_cast<int64_t>((row_count_ + kPreparedRows - 1) / kPreparedRows);
    launch("the prepare phase", prepare_kernel, blocks, kThreads, stream_, prepare_table(table), step);
    for (const BucketPlan& plan : buckets_) {
      if (plan.first_tile_sums < 0) continue;
      launch("the apply phase", accumulate_kernel_of(plan.rule, plan.in_double), plan.blocks, kThreads,
             stream_, bucket(table, plan, reduces));
    }
    if (step.exchanged != 0 && direction_count_ != 0) {
      clear_totals(table);
      launch_directions(table, step, DirectionPass::add_up);
      copy_totals(reinterpret_cast<void*>(step.exchanged), table.at<Sums>(sums_));
      double unused;
      if (exchange && !exchange(nullptr, device_, &unused)) return false;
      copy_totals(table.at<Sums>(sums_), reinterpret_cast<const void*>(step.exchanged));
      launch_directions(table, step, DirectionPass::prepare);
    } else {
      launch_directions(table, step, DirectionPass::whole);
    }
    for (const BucketPlan& plan : buckets_) {
      const bool second = plan.first_tile_sums >= 0;
      launch("the apply phase", apply_kernel_of(plan.rule, plan.in_double), plan.blocks, kThreads, stream_,
             bucket(table, plan, reduces != second));
    }
    return true;
  }

  void launch_directions(const Table& table, const CudaStep& step, DirectionPass pass) const {
    launch("the prepare phase", direction_kernel, direction_count_, kThreads, stream_,
           table.at<const DirectionRow>(directions_), table.at<const TileSums>(tile_sums_),
           prepare_table(table), step, pass);
  }

  const int device_;
  const std::vector<size_t> own_;  // the rows' indices in the plan
  std::vector<Row> own_rows_;
  const std::vector<GroupHyper>& hypers_;
  const std::vector<HyperTensors>& tensors_;
  const size_t row_count_, group_count_;
  const bool has_large_patches_;
  Arena arena_;
  size_t rows_ = 0, groups_ = 0, pieces_ = 0, totals_ = 0, small_ = 0, directions_ = 0;
  size_t sums_ = 0, sums_bytes_ = 0, records_ = 0, control_ = 0, tile_sums_ = 0;
  size_t changing_bytes_ = 0;
  int32_t piece_count_ = 0, small_count_ = 0, total_count_ = 0;
  int64_t direction_count_ = 0;
  std::vector<BucketPlan> buckets_;
  std::vector<uint32_t> words_;    // what the table should hold
  std::vector<uint32_t> changed_;  // offsets
  std::unique_ptr<Table> live_;
  std::vector<std::unique_ptr<Table>> captured_;
  cudaEvent_t uploaded_ = nullptr;  // the last upload of words_
  bool uploading_ = false;
  cudaEvent_t done_ = nullptr;
  bool recorded_ = false;
  cudaStream_t recorded_on_ = nullptr;
  cudaStream_t stream_ = nullptr;  // torch's, of this step
  bool active_ = false;            // a row is
  bool reduced_ = false;           // the sums are those of this step's gradients
  bool measures_ = false;          // the last apply() has left its rows' norms on the device
};

template <class Kernel>
cudaError_t load_kernel(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

// Loads every kernel now: during a capture none may be loaded.
cudaError_t load_kernels() {
  for (const bool in_double : {false, true}) {
    for (int rule = 0; rule < Rules::kCount; ++rule) {
      cudaError_t error = load_kernel(apply_kernel_of(rule, in_double));
      const ApplyKernel first = accumulate_kernel_of(rule, in_double);
      if (error == cudaSuccess && first != nullptr) error = load_kernel(first);
      if (error != cudaSuccess) return error;
    }
  }
  for (const cudaError_t error :
       {load_kernel(reduce_kernel), load_kernel(total_kernel), load_kernel(grad_sq_kernel),
        load_kernel(prepare_kernel), load_kernel(direction_kernel),
        has_large_patches() ? load_kernel(large_patch_kernel())
                            : load_kernel(patch_kernel<kPatchWordsSmall>)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

std::unique_ptr<CudaPhases> CudaPhases::create(int device, const std::vector<Row>& rows,
                                               std::vector<size_t> own, const std::vector<GroupHyper>& groups,
                                               const std::vector<HyperTensors>& tensors) {
  const std::string reason = why_no_cuda(device);
  if (!reason.empty()) throw std::runtime_error("fused_optim: the CUDA backend cannot be used: " + reason);
  return std::make_unique<CudaPhasesOfDevice>(device, rows, std::move(own), groups, tensors);
}

std::string why_no_cuda(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no CUDA driver that this build can use: ") + cudaGetErrorString(error);
  }
  if (device < 0 || device >= count) return "there is no CUDA device " + std::to_string(device);
  {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    error = guard.error();
    if (error == cudaSuccess) error = load_kernels();
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  const std::string text = cudaGetErrorString(error);
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion &&
      error != cudaErrorInvalidDeviceFunction) {
    return "CUDA device " + std::to_string(device) + " cannot be used: " + text;
  }
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "no kernel for its architecture, sm_" + std::to_string(major) + std::to_string(minor) +
         ", was compiled in (set FUSED_OPTIM_CUDA_ARCHS when building): " + text;
}

uint64_t cuda_launches() { return launches.load(); }

}  // namespace fused_optim
