// The last step of spectrum, and the scale of rounding in its Grams.
#pragma once

#include <cstdint>

#include "cuda/cholesky.cuh"
#include "cuda/device.cuh"

namespace fedlora::cuda {

// Sum of the squared norms of the R rank-1 terms; NaN or Inf where an entry is.
__device__ inline double terms_of(int rank, const double* gram_b, const double* gram_a,
                                  const double* scale) {
  const int64_t step = static_cast<int64_t>(rank) + 1;
  return warp_sum(rank,
                  [&](int i) { return gram_b[i * step] * scale[i] * scale[i] * gram_a[i * step]; });
}

struct RightSolve {
  int64_t modules;
  int rank;               // R
  const double* row;      // [L, R] diagonal of T D
  const double* lower;    // [L, R, R] L, column-major
  const double* vectors;  // [L, R, R] W, column-major
  const int* pivot;       // [L, R] the row of L's j-th pivot
  const int* kept;        // [L] columns of L
  const int* count;       // [L] columns of W
  double* right;          // [L, R, R]
  const int* solved;      // [L] where not 0, right is left alone; or null
};

// right = W^T L^- T D, rows from `count` on zero.
void solve_right(const RightSolve& task, Stream stream);

}  // namespace fedlora::cuda
