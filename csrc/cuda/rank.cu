// Formula and ties: rank.h.
//
// Layout     sigma row-major; one thread a module walks its values until the share is reached: p
//            additions in the order of the definition, some 40 clocks each and all modules at once,
//            2 us for p = 100, which no parallel scan would undercut by more than a launch costs.
// Precision  float64; no shared memory.
#include <limits>

#include "rank.h"

namespace fedlora::cuda {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kThreads = 32;

__global__ void __launch_bounds__(kThreads)
    scan(int64_t modules, int64_t rank, const double* sigma, const double* total_energy,
         double energy, int64_t cap, int64_t* ranks) {
  const int64_t module = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (module >= modules) return;
  const double* values = sigma + module * rank;
  const double negligible = static_cast<double>(rank) * kEps;
  const double wanted = (energy - 4 * negligible) * total_energy[module];
  double sum = 0;
  int64_t p = 0;
  while (p < rank && p < cap) {
    const double square = values[p] * values[p];
    if (!(square > negligible * values[0] * values[0])) break;
    sum += square;
    ++p;
    if (sum >= wanted) break;
  }
  ranks[module] = p;
}

}  // namespace

void select_rank(int64_t modules, int64_t rank, const double* sigma, const double* total_energy,
                 double energy, int64_t cap, int64_t* ranks, Stream stream) {
  if (modules == 0) return;
  launch(scan, dim3(static_cast<unsigned>((modules + kThreads - 1) / kThreads)), kThreads, 0,
         stream, modules, rank, sigma, total_energy, energy, cap, ranks);
}

}  // namespace fedlora::cuda
