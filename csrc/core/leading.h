// The leading eigenpairs of a symmetric positive semidefinite matrix whose trace is known.
//
//   V = [Q_1 Q_2 ...],  Q_1 random,  Q_{j+1} R_j = M Q_j - V V^T M Q_j     block Krylov space
//   H = V^T M V = S diag(theta) S^T                                         Ritz values
//
// Nothing that was missed exceeds
//   trace(M) - sum_{i<=k} theta_i + theta_{p+1}               with p converged pairs of k, or
//   min(trace(M) - sum theta, sqrt(||M||_F^2 - sum theta^2))  with the sums over converged ones,
// so as soon as either is at most theta_p and the first p pairs reach the wanted energy or number,
// they are the p leading ones: a certificate, not a hope. (The first is about M without the p
// pairs: its trace is known, and its Ritz values are the other k - p, so its largest eigenvalue is
// no more than what the trace leaves beside all of these but their largest.) Where no certificate
// comes before a quarter of the dimension, LAPACK's dsyevd takes over; what was spent by then is a
// seventh of it. The whole of spectrum (Zen 5, one core): p = 15, R = 512 in 11 ms, 41 with dsyevd;
// R = 128 in 0.65, 1.3 with dsyevd. Independent clients, where nothing is certified: 45 and 1.5.
#pragma once

#include <cstdint>
#include <functional>

#include "memory.h"

namespace fedlora {

struct Eigenpairs {
  int64_t count = 0;       // how many were computed
  Buffer<double> values;   // [n] descending, zero from count on
  Buffer<double> vectors;  // [n, count] column-major
  bool converged = true;
};

// Whether the Krylov space is tried first, for a share of the trace and a number of pairs.
bool krylov_pays(int64_t n, double share, int64_t cap);

// A matrix of known trace that is applied and never formed: image = M block, both [n, count]
// column-major.
struct Applied {
  int64_t n;
  double trace;
  std::function<void(int64_t count, const double* block, double* image)> apply;
};

// The same from products alone, in a space of n / 16 dimensions; false where the trace has
// certified nothing by then.
bool leading_eigenpairs(const Applied& m, double wanted, int64_t cap, Eigenpairs& found);

// m: [n, n], both triangles, destroyed. wanted: sum of eigenvalues after which no more are needed;
// cap: how many are needed at most.
Eigenpairs leading_eigenpairs(int64_t n, double* m, double wanted, int64_t cap);

}  // namespace fedlora
