// Pivoted Cholesky of one symmetric matrix by one block of threads, without swapping rows.
//
//   q_j = argmax d,   l_j = (a_q - sum_{t<j} l_t l_t[q]) / sqrt(d_q),   d -= l_j^2
//
// Left-looking: a column of the matrix is read once, when its pivot is chosen, so only L needs
// memory; L keeps the matrix's own row order and is zero in the rows of earlier pivots. n^3/2
// numbers of L are read in all, n = 128 in shared memory: 8 MB at 128 bytes a clock, 33 us.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device.cuh"

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

// Bytes of shared memory for so many vectors of n numbers, the partial sums and, if `whole`,
// L [n, n].
inline size_t factor_shared(int64_t n, int vectors, bool whole) {
  const auto size = static_cast<size_t>(n);
  const size_t partial = std::max<size_t>(kFactorThreads, (size + 31) / 32 * 32);
  const size_t factor = whole ? size * size : 0;
  return (factor + static_cast<size_t>(vectors) * size + partial) * sizeof(double);
}

// Columns of L to l (column-major, leading dimension ld) until no diagonal entry exceeds
// `tolerance`; returns how many. diagonal [n] and partial in shared memory; diagonal holds the
// matrix's and is destroyed. column(q, i) is the matrix's entry; store(j, i, value) and
// chosen(j, q) also hand the results on. Call with all threads, after a barrier.
template <class Column, class Store, class Chosen>
__device__ int pivoted_cholesky(int n, double* l, int ld, double* diagonal, double* partial,
                                double tolerance, const Column& column, const Store& store,
                                const Chosen& chosen) {
  if (n == 0) return 0;
  constexpr double kDone = -1e300;  // below every diagonal entry, whatever rounding made of it
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int rows = (n + 31) / 32 * 32;
  const int parts = cholesky_parts(n, threads);
  const int part = parts > 1 ? thread / rows : 0;
  const int first = parts > 1 ? thread % rows : thread;
  const int stride = parts > 1 ? rows : threads;
  for (int j = 0; j < n; ++j) {
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
  return n;
}

}  // namespace fedlora::cuda
