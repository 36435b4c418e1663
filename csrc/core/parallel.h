// The parallel loops: over modules, and inside a module when there are few.
//
// Threads start and end with the loop (30 us each, against milliseconds of work): nothing survives
// a fork, and nothing runs when nothing is asked. Tasks are handed out one by one, and what a task
// computes never depends on which thread runs it or on how many there are. A team is opened only
// where every thread of it has more to do than its start costs.
#pragma once

#include <cstdint>
#include <functional>

namespace fedlora {

// How many of `threads` threads are worth their start for work of so many nanoseconds on one.
int team(double nanoseconds, int threads);

// body(task) for every task in [0, tasks), on at most `threads` threads. The first exception (by
// task) is thrown again here, after all threads have ended.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

// body(module, threads) for every module of `nanoseconds` each: one thread each while modules fill
// all threads, and all threads for each of a small rest.
void over_modules(int64_t modules, double nanoseconds, int threads,
                  const std::function<void(int64_t, int)>& body);

}  // namespace fedlora
