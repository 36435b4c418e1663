// The square roots of a batch of positive semidefinite matrices' eigenvalues, and eigenvectors.
//
//   M + t I = G G^T          pivoted Cholesky; t = kShift max(R eps, noise) max(trace, size)
//   G V = W (S^2 + t)^1/2    one-sided Jacobi, without accumulating V
//
// Rounding, and float32 sums, leave M indefinite by a small share of its trace or of the terms that
// canceled in it (`size`); shifted by more than that it is positive definite, and subtracting t
// again costs nothing the matrix knew. G's columns, in the order of the pivots, need two thirds of
// the sweeps that M's own would (9 instead of 13 at n = 128 for clients that share A's start).
//
// One block of threads holds G in its shared memory (n = 168 with 227 KB, 142 with 163), from
// sm_90 on also a cluster of 2, 4 or 8 (n = 472). The vendor's solver takes M itself, of any size.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"

namespace fedlora::cuda {

// Rounding of M was seen to reach 0.4 R eps of the larger of trace and size.
constexpr double kShift = 4;

constexpr int kLeastExponent = -1020;  // of the scale of M: 2^1020 is still finite

struct Eigenproblem {
  int64_t modules;
  int64_t rank;          // R, the rows that memory is laid out for
  const int* sizes;      // [L] n <= R
  const double* terms;   // [L] sum of the squared norms of what M is made of: `size` above
  double noise;          // relative error of M's entries beyond rounding
  double* matrix;        // [L, R, R] M, zero beyond n; then eigenvectors in its columns, an
                         // eigenvector contiguous, descending
  double* factor;        // [L, R, R] scratch
  double* sigma;         // [L, R] descending, zero where sigma^2 <= R eps max(sigma_1^2, terms)
  int* count;            // [L] how many are not zero
  double* total_energy;  // [L] trace(M)
  int64_t* info;         // [L]
  const int* solved;     // [L] where not 0, everything is left alone; or null
  void* workspace;
};

// Which solver the present device uses for a rank.
struct Eigensolver {
  int blocks;          // of the cluster that rotates a module's columns; 0: the vendor's solver
  const char* source;  // where the limits of this choice come from
};

// From a table of the device's kind. A stream that is captured into a graph gets Jacobi wherever
// shared memory holds G, because the vendor's solver cannot be captured.
Eigensolver eigensolver_of(int64_t rank, bool captured);

// Throws std::runtime_error where a captured stream would need the vendor's solver.
size_t eigensolver_workspace(int64_t modules, int64_t rank, bool captured);
void solve_eigenproblem(const Eigenproblem& problem, Stream stream);

}  // namespace fedlora::cuda
