// AdamW's element update over tables of several models, without Python and torch: times, the pace of a copy
// measured beside them, and the bits of the results. One line of JSON for each layout and shape.
//
//   nvcc -std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -arch=sm_90 -I csrc -DVARIANT='"three blocks"'
//     [-DFO_BLOCKS=…] scripts/gpu_variants.cu csrc/cuda/apply.cu csrc/cuda/layout.cpp -o three-blocks
//   three-blocks [elements] [repetitions]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/device.h"

#if !defined(VARIANT)
#define VARIANT "as it is"
#endif

using namespace fused_optim;

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Numbers that are no special ones, from their place alone.
__global__ void fill(void* column, int64_t count, DType dtype, uint32_t seed, bool positive) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t bits = static_cast<uint32_t>(i) * 2654435761u + seed;
    bits = (bits ^ bits >> 15) * 2246822519u;
    bits ^= bits >> 13;
    const float size = (static_cast<float>(bits & 0xffff) / 65536.0f + 0.001f) * 1e-2f;
    const float value = positive || (bits >> 20 & 1) ? size : -size;
    if (dtype == DType::float32) static_cast<float*>(column)[i] = value;
    if (dtype == DType::bfloat16) store(static_cast<bfloat16*>(column)[i], value);
    if (dtype == DType::float16) store(static_cast<float16*>(column)[i], value);
    if (dtype == DType::remainder) static_cast<int16_t*>(column)[i] = static_cast<int16_t>(bits & 0x3fff);
  }
}

__global__ void sum_bits(const uint16_t* words, int64_t count, unsigned long long* sum) {
  unsigned long long own = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    own += words[i] * (2ull * static_cast<unsigned long long>(i % 1000003) + 1);
  }
  atomicAdd(sum, own);
}

template <class Value>
class Memory {
 public:
  explicit Memory(size_t count) : bytes_(count * sizeof(Value)) {
    check(cudaMalloc(&at_, std::max<size_t>(bytes_, 1)), "memory");
    check(cudaMemset(at_, 0, bytes_), "memory");
  }
  explicit Memory(const std::vector<Value>& values) : Memory(values.size()) {
    check(cudaMemcpy(at_, values.data(), bytes_, cudaMemcpyHostToDevice), "memory");
  }
  ~Memory() { cudaFree(at_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  Value* get() const { return static_cast<Value*>(at_); }

 private:
  size_t bytes_;
  void* at_ = nullptr;
};

// Microseconds of what a stream does, the median.
template <class F>
double time_of(cudaStream_t stream, int repetitions, const F& f) {
  cudaEvent_t first, last;
  check(cudaEventCreate(&first), "an event");
  check(cudaEventCreate(&last), "an event");
  std::vector<float> times;
  for (int i = 0; i < repetitions; ++i) {
    float milliseconds = 0;
    cudaEventRecord(first, stream);
    f();
    cudaEventRecord(last, stream);
    check(cudaEventSynchronize(last), "a launch");
    cudaEventElapsedTime(&milliseconds, first, last);
    times.push_back(milliseconds);
  }
  cudaEventDestroy(first);
  cudaEventDestroy(last);
  std::sort(times.begin(), times.end());
  return 1e3 * static_cast<double>(times[times.size() / 2]);
}

struct Storages {
  const char* name;
  DType param, grad, master, state;
};

struct Shape {
  const char* name;
  int64_t numel;
};

constexpr DType kNone = DType::none, kF32 = DType::float32, kBf16 = DType::bfloat16, kF16 = DType::float16,
                kSplit = DType::remainder;
const Storages kStorages[] = {{"float32", kF32, kF32, kNone, kF32},
                              {"bfloat16", kBf16, kBf16, kNone, kBf16},
                              {"bfloat16, float32 states", kBf16, kBf16, kNone, kF32},
                              {"bfloat16, split", kBf16, kBf16, kSplit, kF32},
                              {"bfloat16, float32 master", kBf16, kBf16, kF32, kF32},
                              {"float16", kF16, kF16, kNone, kF16}};
const Shape kShapes[] = {{"67108864", 64 << 20}, {"768 x 3072", 768 * 3072}, {"1024", 1024}, {"100", 100}};
const int kPlaces[] = {kParam, kGrad, kMaster, kFirstState + 1, kFirstState + 2};

Record<Adam<false>, float> record_of_a_step() {
  TensorContext tensor{};
  tensor.lr_scale = tensor.weight_decay_scale = tensor.grad_scale = 1;
  tensor.state[0] = 9;
  return {{1, -INFINITY, INFINITY, 0},
          Adam<false>::prepare<float>({1e-3, 0.9, 0.999, 1e-8, 0.01, 1, 0}, tensor)};
}

void measure(const Storages& storages, const Shape& shape, int64_t elements, int repetitions,
             double copy_pace, const char* gpu, cudaStream_t stream) {
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(elements / shape.numel, 100000));
  const int64_t apart = (shape.numel + 63) / 64 * 64;
  const DType dtypes[] = {storages.param, storages.grad, storages.master, storages.state, storages.state};
  std::vector<std::unique_ptr<Memory<unsigned char>>> columns;
  std::vector<Row> rows(static_cast<size_t>(count));
  for (int c = 0; c < 5; ++c) {
    const auto bytes = static_cast<size_t>(size_of(dtypes[c]));
    columns.push_back(std::make_unique<Memory<unsigned char>>(static_cast<size_t>(apart * count) * bytes));
    for (size_t r = 0; r < rows.size(); ++r) {
      rows[r].dtype[kPlaces[c]] = dtypes[c];
      if (bytes != 0) {
        rows[r].address[kPlaces[c]] =
            reinterpret_cast<uint64_t>(columns.back()->get() + r * static_cast<size_t>(apart) * bytes);
      }
    }
    if (bytes != 0) fill<<<1024, 256, 0, stream>>>(columns.back()->get(), apart * count, dtypes[c], c, c > 2);
  }
  for (Row& row : rows) {
    row.numel = shape.numel;
    row.active = true;
  }
  const TableLayout layout = lay_out(rows, 1);
  const BucketLayout& plan = layout.buckets.at(0);
  std::vector<ScalarsRecord> records(rows.size());
  const auto record = record_of_a_step();
  for (ScalarsRecord& one : records) std::memcpy(one.bytes, &record, sizeof record);
  const Memory<uint32_t> words(layout.words);
  const Memory<Row> row_memory(rows);
  const Memory<ScalarsRecord> record_memory(records);
  const Memory<Control> control(1);
  const auto* base = reinterpret_cast<const unsigned char*>(words.get());
  const Bucket bucket{reinterpret_cast<const Extent*>(base + plan.extents),
                      reinterpret_cast<const int32_t*>(base + plan.first_extent),
                      row_memory.get(),
                      record_memory.get(),
                      control.get(),
                      nullptr,
                      kFirstState + 1,
                      false};
  const ApplyKernel kernel = apply_kernel_of(0, false);
  const auto step = [&] { kernel<<<static_cast<unsigned>(plan.blocks), kThreads, 0, stream>>>(bucket); };
  step();
  const Memory<unsigned long long> sum(1);
  for (const int c : {0, 2, 3, 4}) {
    const int64_t halves = apart * count * size_of(dtypes[c]) / 2;
    sum_bits<<<1024, 256, 0, stream>>>(reinterpret_cast<uint16_t*>(columns[static_cast<size_t>(c)]->get()),
                                       halves, sum.get());
  }
  check(cudaStreamSynchronize(stream), "the step");
  unsigned long long bits = 0;
  check(cudaMemcpy(&bits, sum.get(), sizeof bits, cudaMemcpyDeviceToHost), "the bits");
  const double microseconds = time_of(stream, repetitions, step);
  cudaFuncAttributes attributes{};
  int blocks = 0;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "the kernel");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel),
                                                      kThreads, 0),
        "the kernel");
  const int moved = 2 * size_of(storages.param) + size_of(storages.grad) + 2 * size_of(storages.master) +
                    4 * size_of(storages.state);
  const double pace =
      static_cast<double>(moved) * static_cast<double>(shape.numel * count) / microseconds / 1e6;
  std::printf(
      "{\"variant\": \"%s\", \"gpu\": \"%s\", \"layout\": \"%s\", \"numel\": \"%s\", \"tensors\": %lld, "
      "\"us\": %.2f, \"tb_per_second\": %.3f, \"copy_tb_per_second\": %.3f, \"share_of_copy\": %.3f, "
      "\"registers\": %d, \"blocks\": %d, \"bits\": \"%016llx\"}\n",
      VARIANT, gpu, storages.name, shape.name, static_cast<long long>(count), microseconds, pace, copy_pace,
      pace / copy_pace, attributes.numRegs, blocks, bits);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t elements = count > 1 ? std::atoll(arguments[1]) : int64_t{256} << 20;
  const int repetitions = count > 2 ? std::atoi(arguments[2]) : 15;
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "the device");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  double copy_pace = 0;
  {
    constexpr size_t kBytes = size_t{1} << 30;
    const Memory<unsigned char> from(kBytes), to(kBytes);
    const double microseconds = time_of(stream, repetitions, [&] {
      cudaMemcpyAsync(to.get(), from.get(), kBytes, cudaMemcpyDeviceToDevice, stream);
    });
    copy_pace = 2.0 * kBytes / microseconds / 1e6;
  }
  for (const Storages& storages : kStorages) {
    for (const Shape& shape : kShapes) {
      measure(storages, shape, elements, repetitions, copy_pace, properties.name, stream);
    }
  }
}
