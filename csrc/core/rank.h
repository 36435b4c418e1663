// rank: the smallest p whose singular values hold the wanted share of the energy.
//
//   sum_{i<=p} sigma_i^2 >= (energy - 4 R eps) total,  sigma_i^2 <= R eps sigma_1^2 counts as 0
//
// or else how many values count (FLoRIST, arXiv 2506.09199, section 4).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace fedlora {

// The share of the largest eigenvalue at or under which an eigenvalue counts as zero.
inline double negligible(int64_t rank) {
  return static_cast<double>(rank) * std::numeric_limits<double>::epsilon();
}

// The energy after which no further singular value is needed.
inline double wanted_energy(double energy, double total, int64_t rank) {
  return (energy - 4 * negligible(rank)) * total;
}

inline int64_t select_rank(const double* sigma, int64_t rank, double total, double energy,
                           int64_t cap) {
  const double wanted = wanted_energy(energy, total, rank);
  double sum = 0;
  int64_t p = 0;
  for (; p < std::min(rank, cap); ++p) {
    const double square = sigma[p] * sigma[p];
    if (!(square > negligible(rank) * sigma[0] * sigma[0])) break;
    sum += square;
    if (sum >= wanted) return p + 1;
  }
  return p;
}

}  // namespace fedlora
