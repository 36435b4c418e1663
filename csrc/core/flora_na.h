// flora_na: FLoRA-NA in one call (arXiv 2509.26399): gram, surrogate, weighted_sum.
//
//   B_hat = sum_u q_u s_u B_u        A_hat = sum_v p_v A_v
//
// The clients' factors are read twice and never copied; the solve between is K x K.
#pragma once

#include "factors.h"
#include "surrogate.h"

namespace fedlora {

// What one module gets: b_hat [m, r], a_hat [r, n] in the factors' type, p and q [K], objective.
struct FloraNaResult {
  void* b_hat;
  void* a_hat;
  double* p;
  double* q;
  double* objective;
};

// weights, scale [K]; b and a hold K clients of equal rank, as one part each or stacked in one.
void flora_na(const Factors& b, const Factors& a, int64_t clients, const double* weights,
              const double* scale, bool fast, const SurrogateOptions& options, int threads,
              const FloraNaResult& result);

}  // namespace fedlora
