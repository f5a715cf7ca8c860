#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/driver.h"
#include "cuda/phases.h"

namespace fused_optim {
namespace {

std::atomic<uint64_t> launches{0};

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

GetContext get_context() {
  static const auto function = find_in_driver<GetContext>("cuCtxGetCurrent");
  return function;
}

SetContext set_context() {
  static const auto function = find_in_driver<SetContext>("cuCtxSetCurrent");
  return function;
}

}  // namespace

void count_launch() { launches.fetch_add(1, std::memory_order_relaxed); }
uint64_t cuda_launches() { return launches.load(); }

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(
      std::string("fused_optim: CUDA error in ") + what + ": " + cudaGetErrorName(error) + " (" +
      cudaGetErrorString(error) +
      "). It may come from earlier work on the device; the parameters and states of this step "
      "are undefined");
}

bool has_large_patches() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
}

DeviceGuard::DeviceGuard(int device) : error_(enter(device)) {}

DeviceGuard::~DeviceGuard() {
  if (entered_) set_context()(before_);
}

cudaError_t DeviceGuard::enter(int device) {
  entered_ = get_context() != nullptr && set_context() != nullptr && get_context()(&before_) == 0;
  if (!entered_) return cudaErrorInitializationError;  // no driver, or it has gone before this process
  return cudaSetDevice(device);
}

bool is_capturing(int device, cudaStream_t stream) {
  const DeviceGuard guard(device);  // a thread without a context would get one on device 0
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

void release_with_graph(cudaStream_t stream, void (*release)(void*), void* self) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph), "asking for the graph of a capture");
  cudaUserObject_t object = nullptr;
  check(cudaUserObjectCreate(&object, self, release, 1, cudaUserObjectNoDestructorSync),
        "tying the table to the graph");
  const cudaError_t error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (error != cudaSuccess) cudaUserObjectRelease(object, 1);
  check(error, "tying the table to the graph");
}

}  // namespace fused_optim
