// Formula and ties: rank.h.
//
// Layout     sigma row-major; one thread a module walks its values until the share is reached: p
//            additions in the order of the definition, some 40 clocks each and all modules at once,
//            2 us for p = 100, which no parallel scan would undercut by more than a launch costs.
// Precision  float64; no shared memory.
#include "rank.cuh"
#include "rank.h"

namespace fedlora::cuda {
namespace {

constexpr int kThreads = 32;

__global__ void __launch_bounds__(kThreads)
    scan(int64_t modules, int64_t rank, const double* sigma, const double* total_energy,
         double energy, int64_t cap, int64_t* ranks) {
  const int64_t module = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (module >= modules) return;
  ranks[module] = rank_of(rank, sigma + module * rank, total_energy[module], energy, cap);
}

}  // namespace

void select_rank(int64_t modules, int64_t rank, const double* sigma, const double* total_energy,
                 double energy, int64_t cap, int64_t* ranks, Stream stream) {
  if (modules == 0) return;
  launch(scan, dim3(static_cast<unsigned>((modules + kThreads - 1) / kThreads)), kThreads, 0,
         stream, modules, rank, sigma, total_energy, energy, cap, ranks);
}

}  // namespace fedlora::cuda
