// stacked_svd for R >= min(m, n) = d: the update itself is smaller than the stack.
//
//   wide (m <= n):  dW dW^T = U S^2 U^T   B_g = U S                    A_g = (S^-1 U^T B D) A
//   tall (n < m):   dW^T dW = V S^2 V^T   B_g = B (D A V)              A_g = V^T
//
// dW is formed 256 columns (rows) at a time in float64 and only its d x d Gram matrix is kept. Seen
// from the smaller side both cases are one: N = near factor [d, R], F = far factor, dW = N D F.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "combine.h"
#include "kernels.h"
#include "lapack.h"
#include "leading.h"
#include "memory.h"
#include "mirror.h"
#include "parallel.h"
#include "rank.h"
#include "stacked_svd.h"

namespace fedlora {
namespace {

constexpr int64_t kChunk = 256;
constexpr double kSpeed = 20;  // operations a nanosecond of one thread

// Terms [start, start + count) of the long dimension in float64: [count, R] for the B side (row by
// row), [R, count] for the A side.
void widen(const Factors& x, int64_t start, int64_t count, double* to) {
  const Kernels& kernel = kernels();
  int64_t offset = 0;
  for (const Part* part = x.parts; part < x.parts + x.count; offset += part->rank, ++part) {
    if (x.rows) {
      for (int64_t i = 0; i < part->rank; ++i) {
        kernel.widen(x.dtype, x.at(*part, i, start), count, to + (offset + i) * count);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        kernel.widen(x.dtype, x.at(*part, start + i, 0), part->rank, to + i * x.rank + offset);
      }
    }
  }
}

// The near factor times D, column-major [d, R].
Buffer<double> near_factor(const Factors& near, const double* scale) {
  const int64_t d = near.depth;
  const int64_t rank = near.rank;
  Buffer<double> wide(d * rank);
  Buffer<double> result(d * rank);
  widen(near, 0, d, wide.get());
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t i = 0; i < d; ++i) {
      result[k * d + i] = scale[k] * (near.rows ? wide[k * d + i] : wide[i * rank + k]);
    }
  }
  return result;
}

// squares[k] += the squares of column k of [count, R] or of row k of [R, count].
void add_squares(bool rows, int64_t rank, int64_t count, const double* chunk, double* squares) {
  for (int64_t outer = 0; outer < (rows ? rank : count); ++outer) {
    for (int64_t i = 0; i < (rows ? count : rank); ++i) {
      const double value = *chunk++;
      squares[rows ? outer : i] += value * value;
    }
  }
}

// dW dW^T seen from the near side, [d, d], both triangles, and the squared norms of the far
// factor's columns, [R]. Always two sums, of the even and of the odd chunks, so that two threads
// help one module and the bits do not depend on their number.
Buffer<double> side_gram(const Factors& far, int64_t d, const double* near, int threads,
                         double* squares) {
  const int64_t rank = far.rank;
  Buffer<double> sums[2] = {Buffer<double>(d * d), Buffer<double>(d * d)};
  Buffer<double> norms[2] = {Buffer<double>(rank), Buffer<double>(rank)};
  const double flops = static_cast<double>(d) * static_cast<double>(d + 2 * rank);
  parallel_for(2, team(static_cast<double>(far.depth) * flops / kSpeed, threads),
               [&](int64_t half) {
                 double* sum = sums[half].get();
                 std::fill_n(sum, d * d, 0.0);
                 std::fill_n(norms[half].get(), rank, 0.0);
                 const Buffer<double> chunk(rank * kChunk);
                 const Buffer<double> dense(d * kChunk);
                 for (int64_t start = half * kChunk; start < far.depth; start += 2 * kChunk) {
                   const int64_t count = std::min(kChunk, far.depth - start);
                   widen(far, start, count, chunk.get());
                   // Column-major: an A chunk is [count, R] and enters transposed, a B chunk is [R,
                   // count].
                   lapack::gemm(false, far.rows, d, count, rank, 1, near, d, chunk.get(),
                                far.rows ? count : rank, 0, dense.get(), d);
                   lapack::syrk(d, count, dense.get(), d, 1, sum, d);
                   add_squares(far.rows, rank, count, chunk.get(), norms[half].get());
                 }
               });
  for (int64_t j = 0; j < d; ++j) {
    for (int64_t i = j; i < d; ++i) sums[0][j * d + i] += sums[1][j * d + i];
  }
  mirror(d, sums[0].get());
  for (int64_t k = 0; k < rank; ++k) squares[k] = norms[0][k] + norms[1][k];
  return std::move(sums[0]);
}

// The near singular vectors, [d, width] (B side, times sigma) or [width, d] (A side).
void write_near(const Factors& near, const double* vectors, int64_t p, int64_t width,
                const double* sigma, void* out) {
  const int64_t d = near.depth;
  Buffer<double> wide(d * width);
  std::fill_n(wide.get(), d * width, 0.0);
  for (int64_t c = 0; c < p; ++c) {
    for (int64_t i = 0; i < d; ++i) {
      const double value = vectors[c * d + i];
      (near.rows ? wide[c * d + i] : wide[i * width + c]) = near.rows ? value : value * sigma[c];
    }
  }
  kernels().narrow(near.dtype, wide.get(), d * width, out);
}

}  // namespace

void svd_by_smaller_side(const Factors& b, const Factors& a, const double* scale,
                         const SvdOptions& options, int threads, const SvdResult& result) {
  const bool tall = a.depth < b.depth;
  const Factors& near = tall ? a : b;
  const Factors& far = tall ? b : a;
  const int64_t d = near.depth;
  const int64_t rank = b.rank;
  const Buffer<double> scaled = near_factor(near, scale);
  const Buffer<double> far_squares(rank);
  const Buffer<double> near_squares(rank);
  const Buffer<double> side = side_gram(far, d, scaled.get(), threads, far_squares.get());
  std::fill_n(near_squares.get(), rank, 0.0);
  add_squares(true, rank, d, scaled.get(), near_squares.get());
  double total = 0;
  double terms = 0;
  for (int64_t k = 0; k < rank; ++k) terms += near_squares[k] * far_squares[k];
  for (int64_t i = 0; i < d; ++i) total += side[i * d + i];
  const Eigenpairs found =
      leading_eigenpairs(d, side.get(), wanted_energy(options.energy, total, rank), options.width);
  if (!found.converged || !std::isfinite(terms)) {
    throw std::runtime_error(
        "the factors hold values that are not finite, or overflow in products");
  }
  counted(found.count, found.values.get(), terms, rank, result.sigma);
  const int64_t p = select_rank(result.sigma, rank, total, options.energy, options.width);
  *result.rank = p;
  write_near(near, found.vectors.get(), p, options.width, result.sigma,
             tall ? result.a_g : result.b_g);

  // Coefficients of the far side, column-major [R, p]: (N D)^T vectors, over sigma on the A side.
  const Buffer<double> coefficients(rank * p);
  const Buffer<double> x(rank * p);
  if (p > 0) {
    lapack::gemm(true, false, rank, p, d, 1, scaled.get(), d, found.vectors.get(), d, 0,
                 coefficients.get(), rank);
  }
  if (tall) {
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t c = 0; c < p; ++c) x[k * p + c] = coefficients[c * rank + k];
    }
    combine_left(b, x.get(), p, options.width, false, threads, result.b_g);
  } else {
    for (int64_t c = 0; c < p; ++c) {
      for (int64_t k = 0; k < rank; ++k) coefficients[c * rank + k] /= result.sigma[c];
    }
    combine_right(a, coefficients.get(), p, options.width, false, threads, result.a_g);
  }
}

}  // namespace fedlora
