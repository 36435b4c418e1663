// What the descents of surrogate read: packed Grams and the cross products M.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace fedlora::cuda {

// Place of (row, column), row <= column, among the upper triangle's entries of a matrix of `size`.
__host__ __device__ constexpr int packed(int size, int row, int column) {
  return row * size - row * (row - 1) / 2 + column - row;
}

struct SurrogateProblem {
  int modules;
  int clients;            // K
  int rank;               // r
  const double* gram_b;   // [L, R, R]
  const double* gram_a;   // [L, R, R]
  const double* weights;  // [K]
  const double* scale;    // [L, K]
  double* packed_b;       // [L, pairs, entries] of the scaled factors
  double* packed_a;       // [L, pairs, entries]
  double* cross;          // [L, K, K] M

  // Pairs of clients u <= v and entries i <= j of a block; entries off the diagonal are multiplied
  // by sqrt(2), so that inner products of packed blocks are those of whole symmetric blocks.
  __host__ __device__ int pairs() const { return clients * (clients + 1) / 2; }
  __host__ __device__ int entries() const { return rank * (rank + 1) / 2; }
};

void prepare_surrogate(const SurrogateProblem& problem, Stream stream);

}  // namespace fedlora::cuda
