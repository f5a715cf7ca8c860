// The CPU backend's driver: which kernels, how many threads, who does which elements.
#include "phases_cpu.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "storage.h"

namespace fused_optim {
namespace {

// A step of fewer elements is done before a second thread has woken up.
constexpr int64_t kSerialElements = 64 * 1024;
// What a thread takes at a time: small enough to balance, large enough that taking costs nothing.
constexpr int64_t kTaskElements = 128 * 1024;

struct Task {
  int64_t first_row, last_row;  // rows [first, last)
  int64_t begin, end;           // of the elements, where it is one row
};

double load_number(const Row& row, int index) {
  switch (row.dtype[index]) {
    case DType::float32:
      return *column<float>(row, index);
    case DType::float64:
      return *column<double>(row, index);
    case DType::bfloat16:
      return load(*column<bfloat16>(row, index));
    case DType::float16:
      return load(*column<float16>(row, index));
    case DType::none:
      break;
  }
  return 0;
}

void store_number(const Row& row, int index, double value) {
  if (row.dtype[index] == DType::float32) *column<float>(row, index) = static_cast<float>(value);
  if (row.dtype[index] == DType::float64) *column<double>(row, index) = value;
}

template <class Rule, class T>
void prepare_row(const Row& row, const GroupHyper& group, double grad_scale, ScalarsRecord& out) {
  typename Rule::Hyper hyper;
  static_assert(sizeof hyper <= sizeof group.value, "raise kMaxHyper");
  std::memcpy(&hyper, group.value, sizeof hyper);
  TensorContext tensor{row.lr_scale, row.weight_decay_scale, grad_scale, {0, 0}};
  for (int i = 0; i < Rule::kStateCount && Rule::kStates[i].per_tensor; ++i) {
    tensor.state[i] = load_number(row, kFirstState + i);
  }
  const auto scalars = Rule::template prepare<T>(hyper, tensor);
  for (int i = 0; i < Rule::kStateCount && Rule::kStates[i].per_tensor; ++i) {
    store_number(row, kFirstState + i, tensor.state[i]);
  }
  std::memcpy(out.bytes, &scalars, sizeof scalars);
}

using PrepareFunction = void (*)(const Row&, const GroupHyper&, double, ScalarsRecord&);

template <class... R>
PrepareFunction prepare_function(RuleList<R...>, int rule, bool in_double) {
  static constexpr PrepareFunction in_float_table[] = {prepare_row<R, float>...};
  static constexpr PrepareFunction in_double_table[] = {prepare_row<R, double>...};
  return (in_double ? in_double_table : in_float_table)[rule];
}

// torch's own OpenMP runtime, reached without linking one: a second runtime would spin against its workers.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
  static const auto function = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return function;
}

// A forked child has none of its parent's workers, so a pool would wait for ever; fresh threads do not.
std::atomic<bool> forked{false};

struct Team {
  const CpuKernels* kernels;
  const Row* rows;
  const ScalarsRecord* scalars;
  const std::vector<Task>* tasks;
  std::atomic<size_t> next{0};
#if defined(__x86_64__)
  unsigned control = _mm_getcsr();  // denormals and rounding as the caller has them
#endif
};

void apply_row(const CpuKernels& kernels, const Row& row, const ScalarsRecord& scalars, int64_t begin, int64_t end) {
  const auto* table = computes_in_double(row.dtype[kParam]) ? kernels.apply_double : kernels.apply_float;
  table[row.rule](row, scalars, begin, end);
}

void work(void* argument) {
  Team& team = *static_cast<Team*>(argument);
#if defined(__x86_64__)
  const unsigned own = _mm_getcsr();
  _mm_setcsr(team.control);
#endif
  for (size_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.tasks->size();) {
    const Task& task = (*team.tasks)[i];
    for (int64_t r = task.first_row; r < task.last_row; ++r) {
      const Row& row = team.rows[r];
      if (!row.active) continue;
      const int64_t end = task.last_row - task.first_row == 1 ? task.end : row.numel;
      apply_row(*team.kernels, row, team.scalars[r], task.begin, end);
    }
  }
#if defined(__x86_64__)
  _mm_setcsr(own);
#endif
}

// Large rows in pieces, runs of small rows together.
void split(const Row* rows, int64_t count, std::vector<Task>& tasks) {
  int64_t first = 0, gathered = 0;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t numel = rows[r].active ? rows[r].numel : 0;
    if (gathered != 0 && gathered + numel > kTaskElements) {
      tasks.push_back({first, r, 0, rows[first].numel});
      first = r;
      gathered = 0;
    }
    if (numel > kTaskElements) {
      if (first < r) tasks.push_back({first, r, 0, rows[first].numel});
      for (int64_t begin = 0; begin < numel; begin += kTaskElements) {
        tasks.push_back({r, r + 1, begin, std::min(numel, begin + kTaskElements)});
      }
      first = r + 1;
    } else {
      gathered += numel;
    }
  }
  if (first < count) tasks.push_back({first, count, 0, rows[first].numel});
}

}  // namespace

bool has_openmp() { return find_openmp() != nullptr; }

const CpuKernels* choose_cpu_kernels(const char* requested) {
  const CpuKernels* available[3];
  int count = 0;
  available[count++] = &cpu_kernels_default;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) available[count++] = &cpu_kernels_avx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    available[count++] = &cpu_kernels_avx512;
  }
#endif
  if (requested == nullptr || *requested == '\0') return available[count - 1];
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(available[i]->capability, requested) == 0) return available[i];
  }
  return nullptr;
}

void prepare_cpu(const Row* rows, int64_t count, const GroupHyper* groups, double grad_scale, ScalarsRecord* out) {
  for (int64_t r = 0; r < count; ++r) {
    if (!rows[r].active) continue;
    const bool in_double = computes_in_double(rows[r].dtype[kParam]);
    prepare_function(Rules{}, rows[r].rule, in_double)(rows[r], groups[rows[r].group], grad_scale, out[r]);
  }
}

void apply_cpu(const CpuKernels& kernels, const Row* rows, int64_t count, const ScalarsRecord* scalars, int threads) {
  int64_t elements = 0;
  for (int64_t r = 0; r < count; ++r) elements += rows[r].active ? rows[r].numel : 0;
  if (threads <= 1 || elements < kSerialElements) {
    for (int64_t r = 0; r < count; ++r) {
      if (rows[r].active) apply_row(kernels, rows[r], scalars[r], 0, rows[r].numel);
    }
    return;
  }
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  std::vector<Task> tasks;
  split(rows, count, tasks);
  Team team{&kernels, rows, scalars, &tasks};
  const GompParallel parallel = registered == 0 && !forked ? find_openmp() : nullptr;
  if (parallel != nullptr) {
    parallel(work, &team, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work, &team);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do all of it.
  }
  work(&team);
  for (auto& other : others) other.join();
}

}  // namespace fused_optim
