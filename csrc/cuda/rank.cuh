// The rule of select_rank for one module, as one thread walks it: formula and ties in rank.h.
#pragma once

#include <limits>

#include "device.cuh"

namespace fedlora::cuda {

__device__ inline int64_t rank_of(int64_t rank, const double* sigma, double total_energy,
                                  double energy, int64_t cap) {
  const double negligible = static_cast<double>(rank) * std::numeric_limits<double>::epsilon();
  const double wanted = (energy - 4 * negligible) * total_energy;
  double sum = 0;
  int64_t p = 0;
  while (p < rank && p < cap) {
    const double square = sigma[p] * sigma[p];
    if (!(square > negligible * sigma[0] * sigma[0])) break;
    sum += square;
    ++p;
    if (sum >= wanted) break;
  }
  return p;
}

}  // namespace fedlora::cuda
