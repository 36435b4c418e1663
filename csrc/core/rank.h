// rank: the smallest p whose singular values hold the wanted share of the energy.
//
//   sum_{i<=p} sigma_i^2 >= (energy - 4 R eps) total
//
// or else how many values count (FLoRIST, arXiv 2506.09199, section 4). What counts as zero
// (docs/kernels.md):
//
//   sigma_i^2 <= R eps max(sigma_1^2, sum_k ||B_k d_k A_k||^2), the sum over the R rank-1 terms
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace fedlora {

// The share of the largest eigenvalue at or under which an eigenvalue counts as zero.
inline double negligible(int64_t rank) {
  return static_cast<double>(rank) * std::numeric_limits<double>::epsilon();
}

// The singular values of `values` (eigenvalues, descending, or what is known of them) in sigma [R],
// with zeros where they count as zero; returns how many do not. terms: the sum of the squared norms
// of the rank-1 terms.
inline int64_t counted(int64_t count, const double* values, double terms, int64_t rank,
                       double* sigma) {
  std::fill_n(sigma, rank, 0.0);
  if (count == 0) return 0;
  const double zero = negligible(rank) * std::max(values[0], terms);
  int64_t p = 0;
  for (; p < count && values[p] > zero; ++p) sigma[p] = std::sqrt(values[p]);
  return p;
}

// The energy after which no further singular value is needed.
inline double wanted_energy(double energy, double total, int64_t rank) {
  return (energy - 4 * negligible(rank)) * total;
}

// sigma as counted() leaves it.
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
