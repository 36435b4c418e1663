// Which solvers the operators of a library would use: what fedlora_kernels.solvers reports. Nothing
// is decided here; the answers come from the functions that the operators ask.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fedlora::operators {

// One module's; backends/libraries.py has the same layout.
struct Problem {
  int64_t rank;     // R
  int64_t rows;     // m
  int64_t columns;  // n
  int64_t cap;      // how many singular values are needed at most
  double energy;
  int64_t fp64;
  int64_t fast;
};

struct Step {
  std::string solver;
  int64_t from;  // stacked ranks for which it is chosen
  int64_t to;    // 0: no limit
  std::string source;
};

// In the order in which they are tried, on the present device.
std::vector<Step> solvers(const Problem& problem);

// A step whose ranks are those around `rank` for which `chosen` holds.
template <class Chosen>
Step step_of(const std::string& solver, const std::string& source, int64_t rank,
             const Chosen& chosen) {
  constexpr int64_t kMost = 16384;  // beyond this nothing changes
  Step step = {solver, rank, rank, source};
  while (step.from > 1 && chosen(step.from - 1)) --step.from;
  while (step.to != 0 && chosen(step.to + 1)) step.to = step.to < kMost ? step.to + 1 : 0;
  return step;
}

}  // namespace fedlora::operators

// A line for each step: solver, from, to and source between tabs; or what went wrong, without tabs.
// The text stays until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* fedlora_solvers(
    const fedlora::operators::Problem* problem);
