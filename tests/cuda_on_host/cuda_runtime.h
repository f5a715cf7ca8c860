// A stand-in for the CUDA runtime's header: with it a host compiler builds the very sources of the CUDA
// phases, and shim.cpp runs their kernels on the processor.
//
// Every thread of a block is a fiber. A barrier counts arrivals and wants the same place in the source of
// all; a warp primitive waits for the lanes that its mask names; what cannot go on is an error of the launch.
// Shared memory holds NaNs when a block starts. Only what the sources use is here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1
};
constexpr unsigned long long cudaEnableDefault = 0;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaUserObjectFlags { cudaUserObjectNoDestructorSync = 1 };
enum cudaUserObjectRetainFlags { cudaGraphUserObjectMove = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
constexpr unsigned cudaEventDisableTiming = 2;
constexpr unsigned cudaStreamNonBlocking = 1;

struct CUstream_st;
struct CUevent_st;
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
struct CUgraph_st;
struct CUuserObject_st;
using cudaGraph_t = CUgraph_st*;
using cudaUserObject_t = CUuserObject_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
struct cudaFuncAttributes {
  int numRegs;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
cudaError_t cudaMalloc(void** address, size_t bytes);
cudaError_t cudaFree(void* address);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph);
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, void (*destroy)(void*),
                                 unsigned references, unsigned flags);
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count);
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                      unsigned flags);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function);

namespace cuda_on_host {

cudaError_t launch(const cudaLaunchConfig_t& config, size_t parameter_bytes, std::function<void()> thread);

void barrier(const char* file, int line);

// Waits for the lanes of `mask` and returns what this lane gets of the values that all of them brought.
enum class Exchange { ballot, shuffle_down, shuffle_xor };
uint64_t exchange(Exchange kind, unsigned mask, uint64_t value, unsigned distance, const char* file,
                  int line);

void count_loaded(size_t bytes);
void count_stored(size_t bytes);

template <class Value>
Value shuffle(Exchange kind, unsigned mask, Value value, unsigned distance, const char* file, int line) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(kind, mask, bits, distance, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_host

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  return cuda_on_host::launch(*config, (sizeof(P) + ...), [kernel, arguments...] { kernel(arguments...); });
}

#define __syncthreads() cuda_on_host::barrier(__FILE__, __LINE__)
#define __ballot_sync(mask, predicate)                                                                       \
  static_cast<unsigned>(cuda_on_host::exchange(cuda_on_host::Exchange::ballot, mask, (predicate) ? 1 : 0, 0, \
                                               __FILE__, __LINE__))
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __shfl_down_sync(mask, value, distance)                                                             \
  cuda_on_host::shuffle(cuda_on_host::Exchange::shuffle_down, mask, value, static_cast<unsigned>(distance), \
                        __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, distance)                                                             \
  cuda_on_host::shuffle(cuda_on_host::Exchange::shuffle_xor, mask, value, static_cast<unsigned>(distance), \
                        __FILE__, __LINE__)

inline int __popc(unsigned value) { return __builtin_popcount(value); }

// Accesses with a cache policy: what the kernels read and write of the tensors, and so what is counted.
template <class Value>
Value __ldcs(const Value* address) {
  cuda_on_host::count_loaded(sizeof(Value));
  return *address;
}
template <class Value>
Value __ldca(const Value* address) {
  return __ldcs(address);
}
template <class Value>
void __stcs(Value* address, Value value) {
  cuda_on_host::count_stored(sizeof(Value));
  *address = value;
}
template <class Value>
void __stwb(Value* address, Value value) {
  __stcs(address, value);
}
