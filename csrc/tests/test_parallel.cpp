#include <doctest/doctest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/parallel.h"

namespace fedlora {

TEST_CASE("every task runs once") {
  for (const int threads : {1, 2, 5}) {
    for (const int64_t tasks : {0, 1, 7, 1000}) {
      std::vector<int> runs(static_cast<size_t>(tasks), 0);
      parallel_for(tasks, threads, [&](int64_t task) { ++runs[static_cast<size_t>(task)]; });
      CHECK(runs == std::vector<int>(static_cast<size_t>(tasks), 1));
    }
  }
}

TEST_CASE("the first failure is thrown after all threads have ended") {
  std::atomic<int> ended{0};
  std::string text;
  try {
    parallel_for(50, 4, [&](int64_t task) {
      ++ended;
      if (task % 20 == 10) throw std::runtime_error("task " + std::to_string(task));
    });
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  CHECK(text == "task 10");
  CHECK(ended == 50);
}

TEST_CASE("modules get one thread each while they fill all, a small rest gets all") {
  for (const int64_t modules : {0, 1, 3, 4, 5, 8, 11}) {
    std::vector<int> threads(static_cast<size_t>(modules), 0);
    over_modules(modules, 1e9, 4,
                 [&](int64_t module, int count) { threads[static_cast<size_t>(module)] = count; });
    for (int64_t module = 0; module < modules; ++module) {
      const int64_t rest = modules % 4 <= 2 ? modules % 4 : 0;
      CHECK(threads[static_cast<size_t>(module)] == (module >= modules - rest ? 4 : 1));
    }
  }
}

TEST_CASE("a team is as large as its work is worth") {
  CHECK(team(0, 8) == 1);
  CHECK(team(1e4, 8) == 1);
  CHECK(team(1e9, 8) == 8);
  CHECK(team(1e9, 0) == 1);
  CHECK(team(4e5, 8) < team(7e5, 8));
  over_modules(3, 1e3, 4, [&](int64_t, int count) { CHECK(count == 1); });
}

}  // namespace fedlora
