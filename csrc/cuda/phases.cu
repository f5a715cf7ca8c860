// The host side of the CUDA backend: the launches of a step.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/phases.h"
#include "cuda/table.h"

namespace fused_optim {
namespace {

template <class... R>
int first_state_of(RuleList<R...>, int rule) {
  static constexpr int table[] = {kFirstState + per_tensor_states<R>()...};
  return table[rule];
}

std::vector<Row> rows_of(const std::vector<Row>& rows, const std::vector<size_t>& own) {
  std::vector<Row> found;
  for (const size_t r : own) found.push_back(rows[r]);
  return found;
}

class CudaPhasesOfDevice final : public CudaPhases {
 public:
  CudaPhasesOfDevice(int device, const std::vector<Row>& rows, std::vector<size_t> own,
                     const std::vector<GroupHyper>& groups, const std::vector<HyperTensors>& tensors,
                     MakeRoom make_room)
      : device_(device),
        own_(std::move(own)),
        hypers_(groups),
        tensors_(tensors),
        own_rows_(rows_of(rows, own_)),
        layout_(lay_out(own_rows_, groups.size())) {
    const DeviceGuard guard(device);
    check(guard.error(), "choosing the device");
    free_tables_of_graphs();
    writer_ = std::make_unique<TableWriter>(device, layout_, std::move(make_room));
    live_ = writer_->make_table();
    check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "creating an event");
  }

  ~CudaPhasesOfDevice() override {
    const DeviceGuard guard(device_);
    if (guard.error() != cudaSuccess) return;  // the process ends: the driver has gone first
    const RelaxedCapture relaxed;
    if (done_ != nullptr) cudaEventDestroy(done_);
    free_tables_of_graphs();
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
        copy_totals(reinterpret_cast<void*>(step.exchanged), live_->at<Sums>(layout_.sums));
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
      copy_totals(table->at<Sums>(layout_.sums), reinterpret_cast<const void*>(step.exchanged));
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
    check(cudaMemcpyAsync(&grad_sq, &live_->at<Control>(layout_.control)->grad_sq, sizeof grad_sq,
                          cudaMemcpyDeviceToHost, stream_),
          "reading the global norm");
    check(cudaStreamSynchronize(stream_), "reading the global norm");
    return grad_sq;
  }

  void refresh() {
    cudaGetLastError();  // an earlier error that was not read is not this step's
    if (recorded_on_ != stream_ && recorded_) {
      check(cudaStreamWaitEvent(stream_, done_, 0), "waiting for the last step's stream");
    }
    writer_->write(own_rows_, hypers_, tensors_);
    writer_->send(*live_, stream_);
  }

  // A table of this step for the replays of the graph that is being captured. A later step would change the
  // live one under them; and the capture may yet fail, so that what it was told was never done. Nothing of
  // it enters the graph: it is there, on the device, before this returns.
  const Table& table_for_replays() {
    cudaGetLastError();
    writer_->write(own_rows_, hypers_, tensors_);
    return writer_->table_for_replays(stream_);
  }

  PrepareTable prepare_table(const Table& table) const {
    return {table.at<Row>(layout_.rows),        table.at<CudaGroup>(layout_.groups),
            table.at<Sums>(layout_.sums),       table.at<ScalarsRecord>(layout_.records),
            table.at<Control>(layout_.control), static_cast<int32_t>(layout_.row_count)};
  }

  void launch_reduce(const Table& table, const CudaStep& step) const {
    const ReduceTable reduce{table.at<Row>(layout_.rows),
                             table.at<CudaGroup>(layout_.groups),
                             table.at<Piece>(layout_.pieces),
                             layout_.piece_count,
                             layout_.small_count,
                             table.at<Sums>(layout_.sums)};
    const int64_t blocks = layout_.piece_count + (layout_.small_count + kWarpsPerBlock - 1) / kWarpsPerBlock;
    launch("the reduce phase", reduce_kernel, blocks, kThreads, stream_, reduce, step);
    launch("the reduce phase", total_kernel, layout_.total_count, kThreads, stream_,
           table.at<const Pieces>(layout_.totals), table.at<const Row>(layout_.rows),
           table.at<Sums>(layout_.sums));
  }

  void clear_totals(const Table& table) const {
    check(cudaMemsetAsync(table.at<Sums>(layout_.sums), 0, layout_.row_count * sizeof(Sums), stream_),
          "clearing the norms");
  }

  void copy_totals(void* to, const void* from) const {
    check(cudaMemcpyAsync(to, from, layout_.row_count * sizeof(Sums), cudaMemcpyDeviceToDevice, stream_),
          "copying the norms");
  }

  Bucket bucket(const Table& table, const BucketLayout& plan, bool backwards) const {
    return {table.at<Extent>(plan.extents),
            table.at<int32_t>(plan.first_extent),
            table.at<Row>(layout_.rows),
            table.at<ScalarsRecord>(layout_.records),
            table.at<Control>(layout_.control),
            table.at<DirectionSums>(layout_.direction_sums),
            first_state_of(Rules{}, plan.kernel.rule),
            backwards};
  }

  // Passes alternate direction: the end of the last one is still in the cache. False: the exchange has
  // failed.
  bool launch_update(const Table& table, const CudaStep& step, bool reduces, const Exchange& exchange) const {
    const auto blocks = static_cast<int64_t>((layout_.row_count + kPreparedRows - 1) / kPreparedRows);
    launch("the prepare phase", prepare_kernel, blocks, kThreads, stream_, prepare_table(table), step);
    for (const BucketLayout& plan : layout_.buckets) {
      if (!plan.has_direction) continue;
      launch("the apply phase", accumulate_kernel_of(plan.kernel), plan.blocks, kThreads, stream_,
             bucket(table, plan, reduces));
    }
    double unused;
    if (layout_.keeps_directions) {
      if (exchange && !exchange(nullptr, device_, &unused)) return false;
    } else if (step.exchanged != 0 && layout_.direction_count != 0) {
      clear_totals(table);
      launch_directions(table, step, DirectionPass::add_up);
      copy_totals(reinterpret_cast<void*>(step.exchanged), table.at<Sums>(layout_.sums));
      if (exchange && !exchange(nullptr, device_, &unused)) return false;
      copy_totals(table.at<Sums>(layout_.sums), reinterpret_cast<const void*>(step.exchanged));
      launch_directions(table, step, DirectionPass::prepare);
    } else {
      launch_directions(table, step, DirectionPass::whole);
    }
    for (const BucketLayout& plan : layout_.buckets) {
      launch("the apply phase", apply_kernel_of(plan.kernel), plan.blocks, kThreads, stream_,
             bucket(table, plan, reduces != plan.has_direction));
    }
    return true;
  }

  void launch_directions(const Table& table, const CudaStep& step, DirectionPass pass) const {
    launch("the prepare phase", direction_kernel, layout_.direction_count, kThreads, stream_,
           table.at<const DirectionRow>(layout_.directions),
           table.at<const DirectionSums>(layout_.direction_sums), prepare_table(table), step, pass);
  }

  const int device_;
  const std::vector<size_t> own_;  // the rows' indices in the plan
  const std::vector<GroupHyper>& hypers_;
  const std::vector<HyperTensors>& tensors_;
  std::vector<Row> own_rows_;
  const TableLayout layout_;
  std::unique_ptr<TableWriter> writer_;
  std::unique_ptr<Table> live_;
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
  for (int rule = 0; rule < Rules::kCount; ++rule) {
    for (const Kernel& kernel : {Kernel{rule, false, false}, {rule, false, true}, {rule, true, false}}) {
      cudaError_t error = load_kernel(apply_kernel_of(kernel));
      const ApplyKernel first = accumulate_kernel_of(kernel);
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
                                               const std::vector<HyperTensors>& tensors,
                                               std::function<void()> make_room) {
  const std::string reason = why_no_cuda(device);
  if (!reason.empty()) throw std::runtime_error("fused_optim: the CUDA backend cannot be used: " + reason);
  return std::make_unique<CudaPhasesOfDevice>(device, rows, std::move(own), groups, tensors,
                                              std::move(make_room));
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

}  // namespace fused_optim
