// x = H^+ x, least norm, for one positive semidefinite H [K, K] by one block of threads.
//
//   U H U = L L^T                               U: unit diagonal
//   x = U L^-T L^-1 U x                         full rank
//   x = U L (L^T L)^-1 (L^T L)^-1 L^T U x       else, with L^T L = F F^T
//
// A client with B times c and A over c is the same client, hence U. Pivots at or under 16 K eps of
// the largest are what duplicate clients leave: noise.
#pragma once

#include <limits>

#include "cuda/cholesky.cuh"
#include "problem.h"

namespace fedlora::cuda {

constexpr double kSolveNoise = 16 * std::numeric_limits<double>::epsilon();  // times K

struct SolveMemory {
  double* factor;    // [K, K] L
  double* second;    // [K, K] F
  double* unit;      // [K] diagonal of U
  double* diagonal;  // [K]
  double* work;      // [K]
  double* inner;     // [K]
  double* partial;   // [max(threads, K rounded up to 32)]
  int* pivot;        // [K] of L
  int* order;        // [K] of F
};

// x = (L L^T)^-1 x for a pivoted factor of full rank `columns` on its pivots' rows; the other rows
// of x become zero. By one warp; lanes go through the rows of a column of L.
__device__ inline void solve_factored(int n, int columns, const double* l, const int* pivot,
                                      double* x, double* work) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int j = 0; j < columns; ++j) {
    const int q = pivot[j];
    const double y = x[q] / l[j * n + q];
    __syncwarp();
    for (int i = lane; i < n; i += 32) {
      if (i != q) x[i] = fma(-l[j * n + i], y, x[i]);
    }
    if (lane == 0) work[j] = y;
    __syncwarp();
  }
  for (int i = lane; i < n; i += 32) x[i] = 0;
  __syncwarp();
  for (int j = columns - 1; j >= 0; --j) {
    const double* column = l + j * n;
    const double known = warp_sum(n, [&](int i) { return column[i] * x[i]; });
    __syncwarp();  // all have read x
    if (lane == 0) x[pivot[j]] = (work[j] - known) / column[pivot[j]];
    __syncwarp();
  }
}

// h: the packed upper triangle of H. Call with all threads, after a barrier; ends with one.
__device__ inline void least_norm_solve(int n, const double* h, double* x,
                                        const SolveMemory& memory) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  double* unit = memory.unit;
  const double* l = memory.factor;
  for (int i = thread; i < n; i += threads) {
    const double entry = h[packed(n, i, i)];
    unit[i] = entry > 0 ? 1 / sqrt(entry) : 0;
    memory.diagonal[i] = entry * unit[i] * unit[i];
    x[i] *= unit[i];
  }
  __syncthreads();
  const double largest = memory.diagonal[warp_argmax(n, memory.diagonal)];
  const double tolerance = n * kSolveNoise * largest;
  __syncthreads();
  const int kept = pivoted_cholesky(
      n, n, memory.factor, n, memory.diagonal, memory.partial, tolerance,
      [&](int q, int i) {
        return h[q < i ? packed(n, q, i) : packed(n, i, q)] * unit[q] * unit[i];
      },
      [](int, int, double) {}, [&](int j, int q) { memory.pivot[j] = q; });
  if (kept == n) {
    if (thread < 32) solve_factored(n, n, l, memory.pivot, x, memory.work);
    __syncthreads();
  } else {
    __syncthreads();  // the diagonal is read to the end of the factorization
    double* inner = memory.inner;
    for (int j = thread / 32; j < kept; j += threads / 32) {
      const double* column = l + j * n;
      const double product = warp_sum(n, [&](int i) { return column[i] * x[i]; });
      const double square = warp_sum(n, [&](int i) { return column[i] * column[i]; });
      if (lane == 0) inner[j] = product, memory.diagonal[j] = square;
    }
    __syncthreads();
    // L^T L is entered column by column, each when its pivot is chosen.
    const int found = pivoted_cholesky(
        kept, kept, memory.second, kept, memory.diagonal, memory.partial, 0,
        [&](int q, int i) {
          double sum = 0;
          for (int t = 0; t < n; ++t) sum = fma(l[q * n + t], l[i * n + t], sum);
          return sum;
        },
        [](int, int, double) {}, [&](int j, int q) { memory.order[j] = q; });
    if (thread < 32) {
      solve_factored(kept, found, memory.second, memory.order, inner, memory.work);
      solve_factored(kept, found, memory.second, memory.order, inner, memory.work);
    }
    __syncthreads();
    for (int i = thread; i < n; i += threads) {
      double sum = 0;
      for (int j = 0; j < kept; ++j) sum = fma(l[j * n + i], inner[j], sum);
      x[i] = sum;
    }
    __syncthreads();
  }
  for (int i = thread; i < n; i += threads) x[i] *= unit[i];
  __syncthreads();
}

}  // namespace fedlora::cuda
