#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fused_optim {
namespace {

// torch's own OpenMP runtime, reached without linking one: a second runtime would spin against its workers.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
  static const auto function = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return function;
}

// A forked child has none of its parent's workers, so a pool would wait for ever; fresh threads do not.
// Watched from the moment the library is loaded: torch may have started its workers long before our first
// step.
std::atomic<bool> forked{false};
const bool watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;

// Threads that take tasks from one list until it is empty.
struct Team {
  RunTask run;
  const void* job;
  size_t tasks;
  std::atomic<size_t> next{0};
#if defined(__x86_64__)
  unsigned control = _mm_getcsr();  // denormals and rounding as the caller has them
#endif
};

void work(void* argument) {
  Team& team = *static_cast<Team*>(argument);
#if defined(__x86_64__)
  const unsigned own = _mm_getcsr();
  _mm_setcsr(team.control);
#endif
  for (size_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.tasks;) team.run(team.job, i);
#if defined(__x86_64__)
  _mm_setcsr(own);
#endif
}

}  // namespace

bool has_openmp() { return find_openmp() != nullptr; }

void run_tasks(RunTask run, const void* job, size_t tasks, int threads) {
  Team team{run, job, tasks};
  if (threads <= 1 || tasks <= 1) return work(&team);
  const GompParallel parallel = watches_forks && !forked ? find_openmp() : nullptr;
  if (parallel != nullptr) return parallel(work, &team, static_cast<unsigned>(threads), 0);
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
