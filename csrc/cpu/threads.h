// Threads of the CPU backend: torch's own workers where there are any, fresh ones otherwise.
#pragma once

#include <cstddef>

namespace fused_optim {

// Whether an OpenMP runtime was found in the process; otherwise std::thread serves.
bool has_openmp();

using RunTask = void (*)(const void* job, size_t task);

// Calls run(job, i) for each i below `tasks`, from at most `threads` threads that take the next number from
// one counter. Returns when all are done.
void run_tasks(RunTask run, const void* job, size_t tasks, int threads);

// The same for an object that is called with the number.
template <class Job>
void run_tasks(const Job& job, size_t tasks, int threads) {
  run_tasks([](const void* object, size_t task) { (*static_cast<const Job*>(object))(task); }, &job, tasks,
            threads);
}

}  // namespace fused_optim
