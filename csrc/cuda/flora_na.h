// flora_na: FLoRA-NA in one call (arXiv 2509.26399) for every module: gram, surrogate,
// weighted_sum.
//
//   B_hat = sum_u q_u s_u B_u        A_hat = sum_v p_v A_v
#pragma once

#include <cstddef>

#include "core/surrogate.h"
#include "factors.h"

namespace fedlora::cuda {

struct FloraNaResult {
  void* b_hat;        // [L, m, r] in the factors' type
  void* a_hat;        // [L, r, n]
  double* p;          // [L, K]
  double* q;          // [L, K]
  double* objective;  // [L, max_sweeps + 1]
};

size_t flora_na_workspace(const Factors& b, const Factors& a, int64_t clients, bool fast,
                          const SurrogateOptions& options);

// weights [K], scale [L, K]; b and a hold K clients of equal rank, listed or stacked.
void flora_na(const Factors& b, const Factors& a, int64_t clients, const double* weights,
              const double* scale, bool fast, const SurrogateOptions& options,
              const FloraNaResult& result, void* workspace, Stream stream);

}  // namespace fedlora::cuda
