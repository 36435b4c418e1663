// Pivoted Cholesky of one symmetric matrix by one block of threads, without swapping rows.
//
//   q_j = argmax d,   l_j = (a_q - sum_{t<j} l_t l_t[q]) / sqrt(d_q),   d -= l_j^2
//
// Left-looking: a column of the matrix is read once, when its pivot is chosen, so only L needs
// memory; L keeps the matrix's own row order and is zero in the rows of earlier pivots. n^3/2
// numbers of L are read in all, n = 128 in shared memory: 8 MB at 128 bytes a clock, 33 us.
//
// Where L does not fit into shared memory, as many columns as do are a panel. When it is full, its
// product is subtracted from the matrix, on tensor cores, and the next one begins: n^3 / columns
// numbers move through the L2 cache instead of n^3/2, n = 512 in panels of 32: 50 MB, not 537.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device.cuh"
#include "mma.cuh"

namespace fedlora::cuda {

// Sum of value(i), i < n, in one fixed order; every thread of the warp gets it.
template <class Value>
__device__ double warp_sum(int n, const Value& value) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < n; i += 32) sum += value(i);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Index of the largest entry, the first of equal ones; every thread of the warp gets it.
__device__ inline int warp_argmax(int n, const double* values) {
  int index = 0;
  double largest = values[0];
  for (int i = static_cast<int>(threadIdx.x) % 32; i < n; i += 32) {
    if (values[i] > largest) largest = values[i], index = i;
  }
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(~0u, largest, step);
    const int place = __shfl_xor_sync(~0u, index, step);
    if (other > largest || (other == largest && place < index)) largest = other, index = place;
  }
  return index;
}

// How many parts of L's columns the threads sum apart; `partial` holds parts * rows numbers.
__host__ __device__ inline int cholesky_parts(int n, int threads) {
  const int rows = (n + 31) / 32 * 32;
  return threads > rows ? threads / rows : 1;
}

constexpr int kFactorThreads = 512;

// Columns of L that lie in shared memory at one time: whole panels, all n, or none.
struct Panel {
  int columns;
  int ld;
};

// Bytes of shared memory for so many vectors of n numbers, the partial sums and a panel.
inline size_t factor_shared(int64_t n, int vectors, Panel panel) {
  const auto size = static_cast<size_t>(n);
  const size_t partial = std::max<size_t>(kFactorThreads, (size + 31) / 32 * 32);
  const size_t held = static_cast<size_t>(panel.columns) * static_cast<size_t>(panel.ld);
  return (held + static_cast<size_t>(vectors) * size + partial) * sizeof(double);
}

// The most that shared memory holds beside so many vectors. A panel's rows are padded to whole
// tiles and four more numbers, so that the lanes of a half-warp, four columns by four rows, read
// from different banks.
inline Panel panel_of(int64_t n, int vectors) {
  const auto fits = [&](Panel panel) {
    return factor_shared(n, vectors, panel) <= device().shared_per_block;
  };
  const auto size = static_cast<int>(n);
  if (fits({size, size})) return {size, size};
  for (const int columns : {32, 16, 8}) {
    const Panel panel = {columns, (size + 31) / 32 * 32 + 4};
    if (fits(panel)) return panel;
  }
  return {0, 0};
}

// Columns of L to l (column-major, leading dimension ld), `most` at most, until no diagonal entry
// exceeds `tolerance`; returns how many. diagonal [n] and partial in shared memory; diagonal holds
// the matrix's and is destroyed; that of a first call goes on in the next one. column(q, i) is the
// matrix's entry; store(j, i, value) and chosen(j, q) also hand the results on. Call with all
// threads, after a barrier.
template <class Column, class Store, class Chosen>
__device__ int pivoted_cholesky(int n, int most, double* l, int ld, double* diagonal,
                                double* partial, double tolerance, const Column& column,
                                const Store& store, const Chosen& chosen) {
  if (n == 0) return 0;
  constexpr double kDone = -1e300;  // below every diagonal entry, whatever rounding made of it
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int rows = (n + 31) / 32 * 32;
  const int parts = cholesky_parts(n, threads);
  const int part = parts > 1 ? thread / rows : 0;
  const int first = parts > 1 ? thread % rows : thread;
  const int stride = parts > 1 ? rows : threads;
  for (int j = 0; j < most; ++j) {
    const int q = warp_argmax(n, diagonal);
    const double pivot = diagonal[q];
    if (!(pivot > tolerance)) return j;
    const int each = (j + parts - 1) / parts;
    const int end = (part + 1) * each < j ? (part + 1) * each : j;
    if (parts > 1 && part < parts && first < n) {
      double sum = 0;
      for (int t = part * each; t < end; ++t) sum = fma(l[t * ld + first], l[t * ld + q], sum);
      partial[part * rows + first] = sum;
    }
    __syncthreads();
    const double root = sqrt(pivot);
    if (part == 0) {
      for (int i = first; i < n; i += stride) {
        double sum = 0;
        if (parts > 1) {
          for (int other = 0; other < parts; ++other) sum += partial[other * rows + i];
        } else {
          for (int t = 0; t < j; ++t) sum = fma(l[t * ld + i], l[t * ld + q], sum);
        }
        const double left = diagonal[i];
        double entry = left == kDone ? 0 : (column(q, i) - sum) / root;
        if (i == q) entry = root;
        store(j, i, entry);
        l[j * ld + i] = entry;
        diagonal[i] = i == q ? kDone : left == kDone ? kDone : left - entry * entry;
      }
    }
    if (thread == 0) chosen(j, q);
    __syncthreads();
  }
  return most;
}

// matrix(i, k) -= sum_t l_t[i] l_t[k] over a panel, to `rest` [n, n]: a warp's tiles are 16 x 32,
// those of one triangle, and every number is written to both. `rest` may be what matrix(i, k)
// reads. Call with all threads; the panel may be overwritten after the next barrier.
template <class Matrix>
__device__ void subtract_panel(int n, const double* l, Panel panel, const Matrix& matrix,
                               double* rest, int ld) {
  constexpr int kRows = 16, kColumns = 32, kDepth = 8;
  constexpr int kTiles = kColumns / 8;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int group = static_cast<int>(threadIdx.x) % 32 / 4;
  const int member = static_cast<int>(threadIdx.x) % 4;
  const int across = (n + kColumns - 1) / kColumns;
  const int down = (n + kRows - 1) / kRows;
  for (int place = warp; place < across * down; place += warps) {
    const int top = place / across * kRows;
    const int left = place % across * kColumns;
    if (top + kRows <= left) continue;
    double sums[kTiles][4] = {};
    for (int start = 0; start < panel.columns; start += kDepth) {
      const double* at = l + (start + member) * panel.ld;
      double u[kDepth / 2];
#pragma unroll
      for (int i = 0; i < kDepth / 2; ++i)
        u[i] = at[i / 2 * 4 * panel.ld + top + group + i % 2 * 8];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        double v[kDepth / 4];
#pragma unroll
        for (int i = 0; i < kDepth / 4; ++i) v[i] = at[i * 4 * panel.ld + left + 8 * tile + group];
        mma<kDepth>(sums[tile], u, v);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int each = 0; each < 4; ++each) {
        const int i = top + group + each / 2 * 8;
        const int k = left + 8 * tile + 2 * member + each % 2;
        if (i >= n || k > i) continue;
        const double value = matrix(i, k) - sums[tile][each];
        rest[static_cast<int64_t>(i) * ld + k] = value;
        rest[static_cast<int64_t>(k) * ld + i] = value;
      }
    }
  }
}

// pivoted_cholesky with L to `lower` (column-major, leading dimension ld), by panels in shared
// memory at `l`. matrix(i, k) is what is factored; `rest` [n, n], leading dimension ld, is what
// it becomes where there is more than one panel, and may be where matrix(i, k) is read.
template <class Matrix, class Chosen>
__device__ int panel_cholesky(int n, double* l, Panel panel, double* diagonal, double* partial,
                              double tolerance, const Matrix& matrix, double* rest, double* lower,
                              int ld, const Chosen& chosen) {
  const bool held = panel.columns > 0;
  const int each = held && panel.columns < n ? panel.columns : n;
  int done = 0;
  const auto left = [&](int i, int k) {
    return done == 0 ? matrix(i, k) : rest[static_cast<int64_t>(i) * ld + k];
  };
  while (true) {
    const int found = pivoted_cholesky(
        n, each < n - done ? each : n - done, held ? l : lower, held ? panel.ld : ld, diagonal,
        partial, tolerance, left,
        [&](int j, int i, double value) { lower[static_cast<int64_t>(done + j) * ld + i] = value; },
        [&](int j, int q) { chosen(done + j, q); });
    if (found < each || done + found == n) return done + found;
    subtract_panel(n, l, panel, left, rest, ld);
    done += found;
    __syncthreads();
  }
}

}  // namespace fedlora::cuda
