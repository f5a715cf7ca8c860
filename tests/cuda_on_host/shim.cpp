// Runs CUDA kernels on the processor: fibers, barriers, warp primitives, a small runtime. See cuda_runtime.h
// here.
//
// The functions under extern "C" at the end are for the tests: the order in which threads run, the bytes that
// were counted, errors to inject, and graphs.
#include <cuda_runtime.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" char __start_cuda_shared[] __attribute__((visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((visibility("hidden")));

#if defined(__x86_64__)
// Stores the stack pointer of one context and goes on in another. swapcontext does the same and asks the
// kernel for the signal mask besides, which takes most of the time of a run.
extern "C" void cuda_on_host_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
  .text
  .type cuda_on_host_switch, @function
  .hidden cuda_on_host_switch
  .globl cuda_on_host_switch
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_on_host_switch, . - cuda_on_host_switch
)");
#endif

namespace cuda_on_host {
namespace {

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; everything else lies on the stack

void start(Context& context, char* stack, size_t bytes, void (*function)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top);
  *--words = nullptr;  // where the caller's address would be: the function never returns
  *--words = reinterpret_cast<void*>(function);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  context = words;
}

void swap(Context& from, Context& to) { cuda_on_host_switch(&from, to); }
#else
using Context = ucontext_t;

void start(Context& context, char* stack, size_t bytes, void (*function)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, function, 0);
}

void swap(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

constexpr size_t kStackBytes = 512 * 1024;
constexpr int kWarp = 32;

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  enum class State { ready, at_barrier, in_warp, done } state;
  const char* file;
  int line;
  uint64_t result;
};

struct WarpMeeting {
  unsigned mask = 0, arrived = 0;
  Exchange kind{};
  const char* file = nullptr;
  int line = 0;
  uint64_t value[kWarp];
  unsigned distance[kWarp];
};

struct Launched {
  unsigned blocks, threads;
  uint64_t loaded, stored;
};

enum Order { ascending, descending, random_order };

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<WarpMeeting> warps;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  size_t current = 0;
  const std::function<void()>* thread = nullptr;
  std::string error;
  Order order = ascending;
  std::mt19937 random;
  std::vector<Launched> launched;
  int devices = 2, driver = 13000, fail_launch_in = -1;
  int context = 0;                    // 1 + the device whose context is current; 0: none is
  unsigned contexts = 0;              // a bit for each device that has one
  cudaError_t kernels = cudaSuccess;  // what asking for one gives
  int copies = 0;
  size_t largest_parameters = 0;
  cudaError_t last_error = cudaSuccess;
  bool capturing = false;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  struct Node {
    cudaLaunchConfig_t config;
    std::function<void()> thread;
  };
  struct UserObject {
    void* pointer;
    void (*destroy)(void*);
    unsigned references;
  };
  struct Graph {
    std::vector<Node> nodes;
    std::vector<UserObject*> objects;
  };
  std::vector<Graph> graphs;
  int waits = 0;  // calls that wait for torch's stream, or that may
  bool driver_is_gone = false;
  int calls_to_no_driver = 0;
  int refused_allocations = 0;
  size_t allocated = 0;  // blocks
};

Machine& machine() {
  static Machine one;
  return one;
}

void fail(const std::string& text) {
  if (machine().error.empty()) machine().error = text;
}

std::string place(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
}

void switch_to_scheduler(Fiber& fiber, bool for_good) {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, m.scheduler_bottom,
                                 m.scheduler_size);
#endif
  (void)for_good;
  swap(fiber.context, m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &m.scheduler_bottom, &m.scheduler_size);
#endif
}

void run_fiber() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_bottom, &m.scheduler_size);
#endif
  (*m.thread)();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = Fiber::State::done;
  switch_to_scheduler(fiber, true);
}

void resume(size_t index) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[index];
  m.current = index;
  threadIdx = dim3(static_cast<unsigned>(index), 0, 0);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  swap(m.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void arrange(std::vector<size_t>& indices) {
  Machine& m = machine();
  std::iota(indices.begin(), indices.end(), 0);
  if (m.order == descending) std::reverse(indices.begin(), indices.end());
  if (m.order == random_order) std::shuffle(indices.begin(), indices.end(), m.random);
}

// Nobody can run: either all wait at one barrier, or the kernel is wrong.
bool release_barrier() {
  Machine& m = machine();
  const Fiber* first = nullptr;
  size_t done = 0;
  for (const Fiber& fiber : m.fibers) {
    if (fiber.state == Fiber::State::done) {
      ++done;
      continue;
    }
    if (fiber.state == Fiber::State::in_warp) {
      fail("lanes wait at " + place(fiber.file, fiber.line) + " for others of their mask that never come");
      return false;
    }
    if (first == nullptr) first = &fiber;
    if (first->file != fiber.file || first->line != fiber.line) {
      fail("divergent barrier: threads of one block wait at " + place(first->file, first->line) + " and at " +
           place(fiber.file, fiber.line));
      return false;
    }
  }
  if (first == nullptr) return false;  // all done
  if (done != 0) {
    fail("divergent barrier: " + std::to_string(done) +
         " threads of a block have left the kernel while others wait at " + place(first->file, first->line));
    return false;
  }
  for (Fiber& fiber : m.fibers) fiber.state = Fiber::State::ready;
  return true;
}

void run_block(size_t threads) {
  Machine& m = machine();
  // As a double it is a NaN, as an integer -1: a value read before it was written shows.
  std::memset(__start_cuda_shared, 0xff, static_cast<size_t>(__stop_cuda_shared - __start_cuda_shared));
  m.fibers.resize(threads);
  m.warps.assign((threads + kWarp - 1) / kWarp, {});
  for (Fiber& fiber : m.fibers) {
    if (fiber.stack == nullptr) fiber.stack.reset(new char[kStackBytes]);
    fiber.state = Fiber::State::ready;
    fiber.fake_stack = nullptr;
    start(fiber.context, fiber.stack.get(), kStackBytes, run_fiber);
  }
  std::vector<size_t> order(threads);
  do {
    for (bool ran = true; ran && m.error.empty();) {
      ran = false;
      arrange(order);
      for (const size_t i : order) {
        if (m.fibers[i].state != Fiber::State::ready) continue;
        resume(i);
        ran = true;
        if (!m.error.empty()) return;
      }
    }
  } while (m.error.empty() && release_barrier());
}

cudaError_t execute(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  Machine& m = machine();
  m.error.clear();
  m.thread = &thread;
  m.launched.push_back({config.gridDim.x, config.blockDim.x, 0, 0});
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::vector<size_t> blocks(config.gridDim.x);
  arrange(blocks);
  for (const size_t block : blocks) {
    blockIdx = dim3(static_cast<unsigned>(block), 0, 0);
    run_block(config.blockDim.x);
    if (!m.error.empty()) return m.last_error = cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, size_t parameter_bytes, std::function<void()> thread) {
  Machine& m = machine();
  if (parameter_bytes > (m.driver >= 12010 ? 32764 : 4096)) return m.last_error = cudaErrorInvalidValue;
  m.largest_parameters = std::max(m.largest_parameters, parameter_bytes);
  if (config.gridDim.x == 0 || config.blockDim.x == 0 || config.blockDim.x > 1024) {
    return m.last_error = cudaErrorInvalidValue;
  }
  if (m.fail_launch_in >= 0 && m.fail_launch_in-- == 0) {
    m.error = "an injected error";
    return m.last_error = cudaErrorLaunchFailure;
  }
  if (!m.capturing) return execute(config, thread);
  m.graphs.back().nodes.push_back({config, std::move(thread)});
  return cudaSuccess;
}

void barrier(const char* file, int line) {
  Fiber& fiber = machine().fibers[machine().current];
  fiber.state = Fiber::State::at_barrier;
  fiber.file = file;
  fiber.line = line;
  switch_to_scheduler(fiber, false);
}

uint64_t exchange(Exchange kind, unsigned mask, uint64_t value, unsigned distance, const char* file,
                  int line) {
  Machine& m = machine();
  const size_t self = m.current;
  Fiber& fiber = m.fibers[self];
  WarpMeeting& warp = m.warps[self / kWarp];
  const auto lane = static_cast<unsigned>(self % kWarp);
  fiber.state = Fiber::State::in_warp;
  fiber.file = file;
  fiber.line = line;
  if ((mask >> lane & 1u) == 0)
    fail("lane " + std::to_string(lane) + " is not in its own mask at " + place(file, line));
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.kind = kind;
    warp.file = file;
    warp.line = line;
  } else if (warp.mask != mask || warp.kind != kind || warp.file != file || warp.line != line) {
    fail("divergent warp: lanes meet at " + place(warp.file, warp.line) + " and at " + place(file, line));
  }
  warp.value[lane] = value;
  warp.distance[lane] = distance;
  warp.arrived |= 1u << lane;
  if (warp.arrived == warp.mask) {
    uint64_t ballot = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1u) != 0 && warp.value[i] != 0) ballot |= uint64_t{1} << i;
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1u) == 0) continue;
      const unsigned from = kind == Exchange::shuffle_xor ? i ^ warp.distance[i] : i + warp.distance[i];
      Fiber& other = m.fibers[self - lane + i];
      const bool there = from < kWarp && (mask >> from & 1u) != 0;
      other.result = kind == Exchange::ballot ? ballot
                     : there                  ? warp.value[from]
                     : from < kWarp           ? ~uint64_t{0}
                                              : warp.value[i];
      other.state = Fiber::State::ready;
    }
    warp.arrived = 0;
  }
  switch_to_scheduler(fiber, false);
  return fiber.result;
}

void count_loaded(size_t bytes) { machine().launched.back().loaded += bytes; }
void count_stored(size_t bytes) { machine().launched.back().stored += bytes; }

}  // namespace cuda_on_host

using cuda_on_host::machine;

cudaError_t cudaGetLastError() { return std::exchange(machine().last_error, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    default:
      return "cudaErrorInvalidValue";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return machine().error.c_str();
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  return cudaGetErrorName(error);
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = machine().devices;
  return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= machine().devices) return machine().last_error = cudaErrorInvalidDevice;
  machine().context = 1 + device;
  machine().contexts |= 1u << device;
  return cudaSuccess;
}

namespace {

// A call that a process must not make when the driver has gone.
void calls_driver() { machine().calls_to_no_driver += machine().driver_is_gone; }

int get_context(void** context) {
  if (machine().driver_is_gone) return 4;  // CUDA_ERROR_DEINITIALIZED
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(machine().context));
  return 0;
}

int set_context(void* context) {
  machine().context = static_cast<int>(reinterpret_cast<intptr_t>(context));
  return 0;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = std::strcmp(name, "cuCtxGetCurrent") == 0   ? reinterpret_cast<void*>(get_context)
              : std::strcmp(name, "cuCtxSetCurrent") == 0 ? reinterpret_cast<void*>(set_context)
                                                          : nullptr;
  *result = *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = machine().driver;
  return cudaSuccess;
}

namespace {

cudaError_t refuse_in_capture() {
  auto& m = machine();
  const bool refused = m.capturing && m.mode != cudaStreamCaptureModeRelaxed;
  return refused ? m.last_error = cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

// Work that a capture would not take in.
cudaError_t use_of(cudaStream_t stream) {
  if (stream != nullptr || !machine().capturing) return refuse_in_capture();
  return machine().last_error = cudaErrorStreamCaptureUnsupported;
}

}  // namespace

cudaError_t cudaMalloc(void** address, size_t bytes) {
  if (const cudaError_t error = refuse_in_capture(); error != cudaSuccess) return error;
  if (machine().refused_allocations > 0) {
    --machine().refused_allocations;
    return machine().last_error = cudaErrorMemoryAllocation;
  }
  ++machine().allocated;
  *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*address, 0xff, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  calls_driver();
  if (const cudaError_t error = refuse_in_capture(); error != cudaSuccess) return error;
  --machine().allocated;
  std::free(address);
  return cudaSuccess;
}
// The default stream is the one that is captured.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (const cudaError_t error = use_of(stream); error != cudaSuccess) return error;
  if (kind != cudaMemcpyDeviceToDevice) {
    ++machine().copies;
    machine().waits += stream == nullptr;  // from memory that is not pinned
  }
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = use_of(stream); error != cudaSuccess) return error;
  std::memset(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(std::malloc(1));
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  calls_driver();
  std::free(reinterpret_cast<void*>(event));
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  ++machine().waits;
  return refuse_in_capture();
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t stream) { return use_of(stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return refuse_in_capture(); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(std::malloc(1));
  return refuse_in_capture();
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::free(reinterpret_cast<void*>(stream));
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  machine().waits += stream == nullptr;
  return use_of(stream);
}
cudaError_t cudaDeviceSynchronize() {
  ++machine().waits;
  return refuse_in_capture();
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = machine().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
// A graph's handle is its number, from 1 on.
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*,
                                     cudaGraph_t* graph) {
  *status = machine().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *graph = reinterpret_cast<cudaGraph_t>(machine().capturing ? machine().graphs.size() : 0);
  return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, void (*destroy)(void*),
                                 unsigned references, unsigned) {
  *object =
      reinterpret_cast<cudaUserObject_t>(new cuda_on_host::Machine::UserObject{pointer, destroy, references});
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t handle, unsigned count) {
  auto* object = reinterpret_cast<cuda_on_host::Machine::UserObject*>(handle);
  object->references -= count;
  if (object->references > 0) return cudaSuccess;
  object->destroy(object->pointer);
  delete object;
  return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned) {
  const auto number = reinterpret_cast<uintptr_t>(graph);
  if (number == 0 || number > machine().graphs.size()) return machine().last_error = cudaErrorInvalidValue;
  machine().graphs[number - 1].objects.push_back(
      reinterpret_cast<cuda_on_host::Machine::UserObject*>(object));
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  calls_driver();
  std::swap(*mode, machine().mode);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return machine().last_error = machine().kernels;
}

// order: 0 ascending, 1 descending, 2 random from the seed.
EXPORTED void cuda_on_host_schedule(int order, unsigned seed) {
  machine().order = static_cast<cuda_on_host::Order>(order);
  machine().random.seed(seed);
}

// The launches since the last call: blocks, threads, bytes loaded and stored of each; returns how many there
// were.
EXPORTED int cuda_on_host_launches(uint64_t (*out)[4], int room) {
  auto& launched = machine().launched;
  const int count = static_cast<int>(launched.size());
  for (int i = 0; i < std::min(count, room); ++i) {
    const auto& one = launched[static_cast<size_t>(i)];
    const uint64_t facts[4] = {one.blocks, one.threads, one.loaded, one.stored};
    std::memcpy(out[i], facts, sizeof facts);
  }
  launched.clear();
  return count;
}

// The launch after `after` more returns an error; -1: none does.
EXPORTED void cuda_on_host_fail_launch(int after) { machine().fail_launch_in = after; }

EXPORTED void cuda_on_host_device(int devices, int driver, int kernels) {
  machine().devices = devices;
  machine().driver = driver;
  machine().kernels = static_cast<cudaError_t>(kernels);
}

// Leaves this thread without a context, as a thread is that has not used CUDA.
EXPORTED void cuda_on_host_forget_contexts() { machine().context = machine().contexts = 0; }

// A bit for each device on which there is a context; -1 if one is current.
EXPORTED int cuda_on_host_contexts() {
  return machine().context != 0 ? -1 : static_cast<int>(machine().contexts);
}

// The bytes of parameters of the launch that had most, since the last call.
EXPORTED uint64_t cuda_on_host_largest_parameters() {
  return std::exchange(machine().largest_parameters, size_t{0});
}

// The copies since the last call.
EXPORTED int cuda_on_host_copies() { return std::exchange(machine().copies, 0); }

EXPORTED void cuda_on_host_begin_capture() {
  machine().graphs.emplace_back();
  machine().capturing = true;
}

// Returns the number of the graph, by which it is replayed.
EXPORTED int cuda_on_host_end_capture() {
  machine().capturing = false;
  return static_cast<int>(machine().graphs.size()) - 1;
}

EXPORTED void cuda_on_host_destroy_graph(int graph) {
  auto& destroyed = machine().graphs[static_cast<size_t>(graph)];
  for (auto* object : destroyed.objects) cudaUserObjectRelease(reinterpret_cast<cudaUserObject_t>(object), 1);
  destroyed.nodes.clear();
  destroyed.objects.clear();
}

// The calls that wait for torch's stream, or that may, since the last call.
EXPORTED int cuda_on_host_waits() { return std::exchange(machine().waits, 0); }

// gone: as in a process that ends. Returns how many calls there have been to a driver that was gone.
EXPORTED int cuda_on_host_driver_is_gone(int gone) {
  machine().driver_is_gone = gone != 0;
  return std::exchange(machine().calls_to_no_driver, 0);
}

// The next allocations find no memory.
EXPORTED void cuda_on_host_refuse_allocations(int count) { machine().refused_allocations = count; }

// The blocks of memory that are allocated now.
EXPORTED int cuda_on_host_allocated() { return static_cast<int>(machine().allocated); }

EXPORTED int cuda_on_host_replay(int graph) {
  for (const auto& node : machine().graphs[static_cast<size_t>(graph)].nodes) {
    const cudaError_t error = cuda_on_host::execute(node.config, node.thread);
    if (error != cudaSuccess) return error;
  }
  return 0;
}
