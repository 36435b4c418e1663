// The leading part of a spectrum, where a certificate proves that nothing larger was missed.
//
//   C = (D G_A D) G_B        self-adjoint and semidefinite in <x, y> = x^T G_B y; its eigenvalues
//                            are those of dW dW^T (and zeros), its trace is the total energy
//   X^T G_B X = I            a block of 32 or 64 vectors, twice orthonormalized
//   X^T G_B C X = V Th V^T   Ritz values Th and vectors X V; then C X V begins the next iteration
//
// With q converged pairs, nothing outside them exceeds
//   U_q = Th_{q+1} + trace(C) - sum Th,
// the largest Ritz value that is not counted and all that the block has not seen. As soon as
// U_q <= Th_p and the first p <= q pairs reach the wanted energy or number, they are the p leading
// ones. This needs no factor of a Gram matrix, no matrix M and no triangular solve:
//
//   left = C X S^-1          right = S^-1 (G_B X)^T D        S = Th^1/2
//
// so that right A is orthonormal and B left = dW (right A)^T, however far the block has converged.
#pragma once

#include <cstdint>
#include <vector>

#include "spectrum.h"

namespace fedlora::cuda {

// Memory of one call, each [L, R, R].
struct LeadingMemory {
  double* image;  // C X
  double* dual;   // G_B X
};

// One launch: with how many vectors, and in the shared memory of how many blocks a module; 0: in
// device memory.
struct Attempt {
  int vectors;
  int blocks;
};

// What is tried on the present device, in this order, for the modules that are left; nothing where
// a block of vectors cannot hold the part that is wanted.
std::vector<Attempt> leading_attempts(int64_t rank, const SpectrumOptions& options);

// solved [L]: 1 for modules with a certificate, whose results are in `out`; 0 for the others, of
// which `out` says nothing yet.
void leading(int64_t modules, int64_t rank, const std::vector<Attempt>& attempts,
             const double* gram_b, const double* gram_a, const double* scale,
             const SpectrumOptions& options, const Spectra& out, int* solved,
             const LeadingMemory& memory, Stream stream);

}  // namespace fedlora::cuda
