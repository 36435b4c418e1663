// spectrum: the singular values of B D A and the coefficients of its singular vectors, from Grams.
//
//   T = diag((G_B,ii / (D G_A D)_ii)^(1/4))       one scale for both factors' columns
//   T D G_A D T = L L^T                           Cholesky; pivoted where the stack is deficient
//   M = L^T T^+ G_B T^+ L = W S^2 W^T             one symmetric problem; trace(M) = total energy
//   left = T^+ L W            B left = U S        no division
//   right = W^T L^- T D       right A = V^T       L^- = [L_1^-1 0] P^T, from the pivots' rows
//
// A large M is not formed, which takes longer than all else: L, G_B and L^T are applied to blocks,
// and the trace is <D G_B D, G_A>. M is formed only where that certifies nothing.
//
// Plain Cholesky (0.2 ms at R = 256 where dpstrf takes 1) serves while every pivot exceeds 1e4
// times the bound of dpstrf; then both give L L^T to rounding.
#pragma once

#include <cstdint>
#include <vector>

#include "leading.h"
#include "memory.h"

namespace fedlora {

// About how long a module takes.
double spectrum_nanoseconds(int64_t rank);

class Spectrum {
 public:
  // Grams [R, R], scale [R]. `noise`: the relative error of the Grams' entries, under which a pivot
  // says nothing (0 for float64 sums). Stops once `energy` or `cap` singular values are there.
  Spectrum(int64_t rank, const double* gram_b, const double* gram_a, const double* scale,
           double noise, double energy, int64_t cap);

  bool converged() const { return eigen_.converged; }
  double total_energy() const { return total_; }
  double terms() const { return terms_; }               // sum_i D_i^2 G_B,ii G_A,ii
  const double* sigma() const { return sigma_.get(); }  // [R], zero where negligible or unknown
  int64_t count() const { return count_; }              // how many are not zero

  // The first p columns of left, x [R, p] row-major, and rows of right, y [p, R].
  void left(int64_t p, double* x) const;
  void right(int64_t p, double* y) const;

 private:
  void factor(const double* gram_a, double noise);
  bool by_products(const double* gram_b, const double* gram_a, const double* scale, double energy,
                   int64_t cap);
  void core(const double* gram_b, double* m) const;
  void apply(const double* gram_b, int64_t count, const double* block, double* image) const;

  int64_t rank_;
  bool plain_ = true;            // no pivoting was needed
  int64_t kept_ = 0;             // columns of L
  std::vector<double> row_;      // the diagonal of T D
  std::vector<double> inverse_;  // the diagonal of T^+
  std::vector<int64_t> pivot_;
  Buffer<double> lower_;  // [R, R] column-major, pivoted rows, zero above the diagonal
  Eigenpairs eigen_;
  Buffer<double> sigma_;
  double total_ = 0;
  double terms_ = 0;
  int64_t count_ = 0;
};

}  // namespace fedlora
