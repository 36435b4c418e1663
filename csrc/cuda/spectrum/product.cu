// Formula: product.h.
//
// Layout     a block computes a tile of 64 x 64 with 256 threads, 4 x 4 numbers each, from slices
//            of depth 16 in shared memory; threads read along whichever index is contiguous.
// Precision  float64, one chain of fused multiply-adds per number.
// Shared     2 slices of 16 x 68 numbers, 17 KB (68: the four rows of a thread's column start in
//            different banks).
#include "product.h"

namespace fedlora::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kEach = 4;
constexpr int kThreads = (kTile / kEach) * (kTile / kEach);
constexpr int kRow = kTile + 4;
constexpr size_t kShared = 2 * kDepth * kRow * sizeof(double);

__device__ inline int extent(const int* kept, int64_t module, int whole) {
  return kept == nullptr ? whole : kept[module];
}

// slice[t, i] = factor_t matrix(i, t) for a tile's rows `first`.. and depths `start`..; `across` is
// the stride of i and `along` that of t.
__device__ inline void load(double* slice, const double* matrix, int across, int along, int first,
                            int rows, int start, int depth, const double* factor) {
  for (int place = static_cast<int>(threadIdx.x); place < kTile * kDepth; place += kThreads) {
    const int i = along == 1 ? place / kDepth : place % kTile;
    const int t = along == 1 ? place % kDepth : place / kTile;
    double value = 0;
    if (first + i < rows && start + t < depth) {
      value = matrix[static_cast<int64_t>(first + i) * across +
                     static_cast<int64_t>(start + t) * along];
      if (factor != nullptr) value *= factor[start + t];
    }
    slice[t * kRow + i] = value;
  }
}

__global__ void __launch_bounds__(kThreads) product(Product p) {
  const int64_t module = blockIdx.x;
  if (p.solved != nullptr && p.solved[module] != 0) return;
  const int rows = extent(p.kept_rows, module, p.rows);
  const int columns = extent(p.kept_columns, module, p.columns);
  const int depth = extent(p.kept_depth, module, p.depth);
  const int top = static_cast<int>(blockIdx.y) * kTile;
  const int left = static_cast<int>(blockIdx.z) * kTile;
  const double* a = p.a.data + module * p.a.module;
  const double* b = p.b.data + module * p.b.module;
  double* c = p.c.data + module * p.c.module;
  const int64_t offset = module * p.factor_stride;
  double* slice_a = shared_memory<double>();
  double* slice_b = slice_a + kDepth * kRow;
  // A thread's rows are 16 apart along the longer stride of C, so that a warp writes runs.
  const bool by_rows = p.c.row == 1;
  const int fast = static_cast<int>(threadIdx.x) % (kTile / kEach);
  const int slow = static_cast<int>(threadIdx.x) / (kTile / kEach);
  const int own_row = by_rows ? fast : slow;
  const int own_column = by_rows ? slow : fast;
  constexpr int kApart = kTile / kEach;

  double sums[kEach][kEach] = {};
  // Singular values descend: from the first zero on there is nothing to divide by.
  const bool zero = p.inverse_squares && top < rows && !(p.row_factor[offset + top] > 0);
  const bool any = top < rows && left < columns && !zero;
  for (int start = 0; any && start < depth; start += kDepth) {
    load(slice_a, a, p.a.row, p.a.column, top, rows, start, depth, nullptr);
    load(slice_b, b, p.b.column, p.b.row, left, columns, start, depth,
         p.depth_factor == nullptr ? nullptr : p.depth_factor + offset);
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kDepth; ++t) {
      double u[kEach], v[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        u[i] = slice_a[t * kRow + own_row + i * kApart];
        v[i] = slice_b[t * kRow + own_column + i * kApart];
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] = fma(u[i], v[j], sums[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = top + own_row + i * kApart;
    if (row >= p.rows) continue;
    double row_factor = p.row_factor == nullptr || row >= rows ? 1 : p.row_factor[offset + row];
    if (p.inverse_squares) row_factor = row_factor > 0 ? 1 / (row_factor * row_factor) : 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int column = left + own_column + j * kApart;
      if (column >= p.columns) continue;
      const bool inside = row < rows && column < columns;
      double value = inside && row_factor != 0 ? sums[i][j] * row_factor : 0;
      if (inside && p.column_factor != nullptr) value *= p.column_factor[offset + column];
      c[static_cast<int64_t>(row) * p.c.row + static_cast<int64_t>(column) * p.c.column] = value;
    }
  }
}

}  // namespace

void multiply(const Product& p, Stream stream) {
  if (p.modules == 0 || p.rows == 0 || p.columns == 0) return;
  const auto tiles = [](int extent) { return static_cast<unsigned>((extent + kTile - 1) / kTile); };
  launch(product, dim3(static_cast<unsigned>(p.modules), tiles(p.rows), tiles(p.columns)), kThreads,
         kShared, stream, p);
}

}  // namespace fedlora::cuda
