// spectrum: the singular values of B D A and the coefficients of its singular vectors, from Grams,
// for a batch of modules; the algebra is that of core/spectrum.h.
//
//   T = diag((G_B,ii / (D G_A D)_ii)^(1/4))       one scale for both factors' columns
//   T D G_A D T = L L^T                           pivoted Cholesky, no rows swapped
//   M = L^T T^+ G_B T^+ L = W S^2 W^T             trace(M) = total energy
//   left = T^+ L W            B left = U S        no division
//   right = W^T L^- T D       right A = V^T       L^- = [L_1^-1 0] P^T, from the pivots' rows
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"

namespace fedlora::cuda {

struct SpectrumOptions {
  double energy = 1;  // what a leading-subspace solver may stop at
  int64_t cap = 0;    // how many singular values are needed at most; 0: all
  double noise = 0;   // relative error of the Grams' entries; 0 for float64 sums
};

struct Spectra {
  double* sigma;         // [L, R] descending, zero where negligible or not computed
  double* total_energy;  // [L]
  double* left;          // [L, R, R], columns zero where sigma is
  double* right;         // [L, R, R], rows zero where sigma is
  int64_t* info;         // [L], 0 where the solver converged
};

// Throws std::runtime_error where the stream is captured and no solver for the rank can be.
size_t spectrum_workspace(int64_t modules, int64_t rank, Stream stream);

// Grams [L, R, R], scale [L, R] (the diagonal of D). A module whose Grams are not finite gets
// info = 1, a total energy of NaN and zeros.
void spectrum(int64_t modules, int64_t rank, const double* gram_b, const double* gram_a,
              const double* scale, const SpectrumOptions& options, const Spectra& out,
              void* workspace, Stream stream);

// For Grams summed in float32: sigma where sigma^2 is at or under eps/16 of
// sum_i D_i^2 G_B,ii G_A,ii is rounding; sets it to zero in place.
void drop_single_noise(int64_t modules, int64_t rank, const double* gram_b, const double* gram_a,
                       const double* scale, double* sigma, Stream stream);

// right = S^-2 left^T G_B D, its first `count` rows (the others are left alone), zero where sigma
// is: the form for Grams summed in float32, which have no small pivots to divide by.
void right_of_left(int64_t modules, int64_t rank, int64_t count, const double* sigma,
                   const double* left, const double* gram_b, const double* scale, double* right,
                   Stream stream);

}  // namespace fedlora::cuda
