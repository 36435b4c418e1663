// solve_right   Y = L_1^-T W by blocks of 16 rows from the last, L_1 the pivots' rows of L; one
//               block of threads per module and 32 columns of W. A thread solves a column's 16
//               rows, all of them update the rows above. right = Y^T P^T T D.
// drop_noise    sigma^2 <= eps/16 sum_i D_i^2 G_B,ii G_A,ii counts as 0 (eps of float32; noise was
//               measured at 2e-8 of that sum, eps is 1.2e-7)
//
// Layout     L, W column-major with leading dimension R; left, right row-major.
// Precision  float64.
// Shared     32 columns of W in rows of 33 numbers (different banks), the corner of L: R <= 840 of
//            227 KB; fewer columns above.
#include <algorithm>
#include <limits>

#include "coefficients.h"
#include "product.h"
#include "spectrum.h"

namespace fedlora::cuda {
namespace {

constexpr double kSingleEps = std::numeric_limits<float>::epsilon();
constexpr int kBlock = 16;  // a thread solves a column's block in half of 16^2 dependent steps
constexpr int kMostColumns = 32;
constexpr int kSolveThreads = 256;

size_t solve_shared(int64_t rank, int width) {
  const auto rows = static_cast<size_t>(rank);
  const size_t doubles = rows * (static_cast<size_t>(width) + 1) + kBlock * (kBlock + 1);
  return doubles * sizeof(double) + 2 * rows * sizeof(int);
}

// Y = L_1^-T W by blocks of rows from the last, L_1 the pivots' rows of L; then right = Y^T P T D.
__global__ void __launch_bounds__(kSolveThreads, 1) solve(RightSolve task, int width) {
  const int64_t module = blockIdx.x;
  if (task.solved != nullptr && task.solved[module] != 0) return;
  const int rank = task.rank;
  const int64_t square = static_cast<int64_t>(rank) * rank;
  const int first = static_cast<int>(blockIdx.y) * width;
  const int kept = task.kept[module];
  const int found = task.count[module] - first;
  const int columns = found < 0 ? 0 : found < width ? found : width;
  const double* lower = task.lower + module * square;
  const double* vectors = task.vectors + module * square;
  double* y = shared_memory<double>();  // [kept, width + 1]
  double* corner = y + static_cast<int64_t>(rank) * (width + 1);
  int* pivot = reinterpret_cast<int*>(corner + kBlock * (kBlock + 1));
  int* place = pivot + rank;
  const int thread = static_cast<int>(threadIdx.x);

  for (int i = thread; i < rank; i += kSolveThreads) place[i] = -1;
  __syncthreads();
  for (int j = thread; j < kept; j += kSolveThreads) {
    pivot[j] = task.pivot[module * rank + j];
    place[pivot[j]] = j;
  }
  for (int i = thread; i < kept * columns; i += kSolveThreads) {
    const int column = i / kept;
    const int j = i % kept;
    y[j * (width + 1) + column] = vectors[static_cast<int64_t>(first + column) * rank + j];
  }
  __syncthreads();
  const int last = columns > 0 ? (kept - 1) / kBlock * kBlock : -1;
  for (int start = last; start >= 0 && kept > 0; start -= kBlock) {
    const int size = kept - start < kBlock ? kept - start : kBlock;
    for (int i = thread; i < size * size; i += kSolveThreads) {
      const int j = i / size;
      const int t = i % size;
      corner[j * (kBlock + 1) + t] =
          lower[static_cast<int64_t>(start + t) * rank + pivot[start + j]];
    }
    __syncthreads();
    if (thread < columns) {
      for (int t = size - 1; t >= 0; --t) {
        double value = y[(start + t) * (width + 1) + thread];
        for (int j = t + 1; j < size; ++j) {
          value = fma(-corner[j * (kBlock + 1) + t], y[(start + j) * (width + 1) + thread], value);
        }
        y[(start + t) * (width + 1) + thread] = value / corner[t * (kBlock + 1) + t];
      }
    }
    __syncthreads();
    const int column = thread % width;
    for (int d = thread / width; d < start && column < columns; d += kSolveThreads / width) {
      double value = y[d * (width + 1) + column];
      for (int j = 0; j < size; ++j) {
        value = fma(-lower[static_cast<int64_t>(d) * rank + pivot[start + j]],
                    y[(start + j) * (width + 1) + column], value);
      }
      y[d * (width + 1) + column] = value;
    }
    __syncthreads();
  }
  const double* row = task.row + module * rank;
  double* right = task.right + module * square;
  for (int column = 0; column < width && first + column < rank; ++column) {
    for (int i = thread; i < rank; i += kSolveThreads) {
      const bool inside = column < columns && place[i] >= 0;
      right[static_cast<int64_t>(first + column) * rank + i] =
          inside ? y[place[i] * (width + 1) + column] * row[i] : 0;
    }
  }
}

__global__ void __launch_bounds__(32)
    drop_noise(int rank, const double* gram_b, const double* gram_a, const double* scale,
               double* sigma) {
  const int64_t module = blockIdx.x;
  const int64_t square = static_cast<int64_t>(rank) * rank;
  const double noise =
      kSingleEps / 16 *
      terms_of(rank, gram_b + module * square, gram_a + module * square, scale + module * rank);
  for (int i = static_cast<int>(threadIdx.x); i < rank; i += 32) {
    double& value = sigma[module * rank + i];
    if (!(value * value > noise)) value = 0;
  }
}

}  // namespace

void solve_right(const RightSolve& task, Stream stream) {
  int width = kMostColumns;
  while (width > 1 && solve_shared(task.rank, width) > device().shared_per_block) width /= 2;
  const auto tiles = static_cast<unsigned>((task.rank + width - 1) / width);
  launch(solve, dim3(static_cast<unsigned>(task.modules), tiles), kSolveThreads,
         solve_shared(task.rank, width), stream, task, width);
}

void drop_single_noise(int64_t modules, int64_t rank, const double* gram_b, const double* gram_a,
                       const double* scale, double* sigma, Stream stream) {
  if (modules == 0 || rank == 0) return;
  launch(drop_noise, dim3(static_cast<unsigned>(modules)), 32, 0, stream, static_cast<int>(rank),
         gram_b, gram_a, scale, sigma);
}

void right_of_left(int64_t modules, int64_t rank, int64_t count, const double* sigma,
                   const double* left, const double* gram_b, const double* scale, double* right,
                   Stream stream) {
  const auto r = static_cast<int>(rank);
  const int64_t square = rank * rank;
  multiply({.modules = modules,
            .rows = static_cast<int>(std::min(count, rank)),
            .columns = r,
            .depth = r,
            .a = {left, square, 1, r},
            .b = {gram_b, square, r, 1},
            .c = {right, square, r, 1},
            .kept_rows = nullptr,
            .kept_columns = nullptr,
            .kept_depth = nullptr,
            .row_factor = sigma,
            .depth_factor = nullptr,
            .column_factor = scale,
            .inverse_squares = true,
            .factor_stride = rank,
            .solved = nullptr},
           stream);
}

}  // namespace fedlora::cuda
