// surrogate: FLoRA-NA's mixing weights (arXiv 2509.26399), solved exactly in Gram space.
//
//   M_uv = sum_k w_k <G_B^{ku}, G_A^{kv}>
//   f(p, q) = ||dW||^2 - 2 q^T M p + <S_B(q), S_A(p)>      S_A(p) = sum p_v p_v' G_A^{vv'}
//   q-step  H_uu' = <G_B^{uu'}, S_A(p)>,  q = H^+ M p;     p-step with the roles exchanged
//
// Alternating least squares can crawl along a valley, so each sweep also looks 2, 5 and 15 times
// further along its own direction. S and H only see symmetric parts, so each Gram is packed once as
// a matrix P of K(K+1)/2 block pairs by r(r+1)/2 entries, and a step is two matrix-vector products:
// S = P^T c(p), H = P S. K = 10, r = 16: 60 KB a side instead of 200.
#pragma once

#include <cstdint>

namespace fedlora {

struct SurrogateOptions {
  int64_t max_sweeps;
  double tolerance;
};

// Grams [R, R] of the unscaled factors, weights and scale [K], R = K r. p and q [K], objective
// [max_sweeps + 1].
void surrogate(int64_t clients, int64_t rank, const double* gram_b, const double* gram_a,
               const double* weights, const double* scale, const SurrogateOptions& options,
               double* p, double* q, double* objective);

}  // namespace fedlora
