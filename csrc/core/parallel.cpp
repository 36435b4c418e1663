#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "memory.h"

namespace fedlora {
namespace {

constexpr double kShare = 1e5;  // nanoseconds: twice what starting and joining a thread takes

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
  if (threads <= 1 || tasks <= 1) {
    const Pool pool;
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  std::mutex guard;
  std::exception_ptr failure;
  int64_t failed = tasks;
  const auto work = [&] {
    const Pool pool;
    for (int64_t task = next++; task < tasks; task = next++) {
      try {
        body(task);
      } catch (...) {
        const std::lock_guard lock(guard);
        if (task < failed) {
          failed = task;
          failure = std::current_exception();
        }
      }
    }
  };
  {
    std::vector<std::jthread> others;
    const int64_t wanted = std::min<int64_t>(threads, tasks) - 1;
    others.reserve(static_cast<size_t>(wanted));
    for (int64_t i = 0; i < wanted; ++i) others.emplace_back(work);
    work();
  }
  if (failure) std::rethrow_exception(failure);
}

int team(double nanoseconds, int threads) {
  return static_cast<int>(std::clamp(nanoseconds / kShare, 1.0, std::max<double>(threads, 1)));
}

void over_modules(int64_t modules, double nanoseconds, int threads,
                  const std::function<void(int64_t, int)>& body) {
  const Pool pool;
  const int64_t width = team(static_cast<double>(modules) * nanoseconds, threads);
  int64_t rest = modules % width;
  // More than half of the threads busy with a module each beat all of them inside one module.
  if (2 * rest > width || width == 1) rest = 0;
  parallel_for(modules - rest, static_cast<int>(width), [&](int64_t module) { body(module, 1); });
  for (int64_t module = modules - rest; module < modules; ++module) body(module, threads);
}

}  // namespace fedlora
