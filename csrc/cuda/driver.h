// What the host asks of the CUDA runtime and the driver: devices, streams, launches, errors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_optim {

// Throws std::runtime_error for an error. It is thrown once: what is left of it is cleared, as far as CUDA
// lets it be.
void check(cudaError_t error, const char* what);

void count_launch();

template <class... P, class... A>
void launch(const char* phase, void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream,
            const A&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  count_launch();
  check(cudaLaunchKernelEx(&config, kernel, arguments...), phase);
}

// Whether kernels may take 32,764 bytes of parameters, and not only 4,096.
bool has_large_patches();

// Makes a device current in this thread, and restores the previous context at the end. Not by cudaSetDevice,
// which would create one there: hundreds of megabytes of a GPU that this process may have nothing to do with.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  cudaError_t enter(int device);

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

bool is_capturing(int device, cudaStream_t stream);

// Has `release` called with `self` when the graph that a stream is being captured into is gone, and what has
// been instantiated from it. Called here, if that cannot be had, which throws.
void release_with_graph(cudaStream_t stream, void (*release)(void*), void* self);

}  // namespace fused_optim
