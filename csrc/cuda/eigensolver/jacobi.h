// The square roots of eigenvalues and the eigenvectors from the factor of a shifted matrix.
#pragma once

#include <cstdint>

#include "eigensolver.h"

namespace fedlora::cuda {

// G in problem.factor, column-major: G G^T = 2^-exponent M + shift I.
struct ShiftedFactor {
  double* shift;  // [L]
  int* exponent;  // [L], even
  int* columns;   // [L] of G
};

// Blocks whose shared memory together holds one module; 0 where no cluster's does.
int jacobi_blocks(int64_t rank);

// problem.sigma, matrix (from G), count; info where it did not converge.
void rotate_columns(const Eigenproblem& problem, const ShiftedFactor& factor, int blocks,
                    Stream stream);

}  // namespace fedlora::cuda
