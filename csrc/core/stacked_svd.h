// stacked_svd: FLoRIST in one call (arXiv 2506.09199): stacked factors in, truncated SVD out.
//
//   dW = B D A = U S V^T        B_g = U_p S_p        A_g = V_p^T        p by energy, at most
//   `width`
//
// Routes: R < min(m, n) through two Gram matrices (grams_route.cpp), R >= min(m, n) through the
// Gram matrix of the update's smaller side (dense_route.cpp), float64 data by QR (qr_route.cpp),
// because a Gram matrix would lose half of their digits.
#pragma once

#include "factors.h"

namespace fedlora {

struct SvdOptions {
  double energy;
  int64_t width;  // columns of the result
  bool fast;
};

enum class Route { kGrams, kSmallerSide, kQr };

// smaller: min(m, n).
Route route_of(bool fp64, bool fast, int64_t rank, int64_t smaller);

// What one module gets: b_g [m, width] and a_g [width, n] in the factors' type, sigma [R].
struct SvdResult {
  void* b_g;
  void* a_g;
  double* sigma;
  int64_t* rank;
};

// scale [R]. Throws std::runtime_error where the factors are not finite.
void stacked_svd(const Factors& b, const Factors& a, const double* scale, const SvdOptions& options,
                 int threads, const SvdResult& result);

// About how long a module takes one thread.
double stacked_svd_nanoseconds(const Factors& b, const Factors& a);

void svd_by_grams(const Factors& b, const Factors& a, const double* scale,
                  const SvdOptions& options, int threads, const SvdResult& result);
void svd_by_smaller_side(const Factors& b, const Factors& a, const double* scale,
                         const SvdOptions& options, int threads, const SvdResult& result);
void svd_by_qr(const Factors& b, const Factors& a, const double* scale, const SvdOptions& options,
               int threads, const SvdResult& result);

}  // namespace fedlora
