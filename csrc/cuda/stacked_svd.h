// stacked_svd: FLoRIST in one call (arXiv 2506.09199) for every module, on the device and without
// waiting for it.
//
//   dW = B D A = U S V^T        B_g = U_p S_p        A_g = V_p^T        p by energy, at most
//   `width`
#pragma once

#include <cstddef>
#include <cstdint>

#include "factors.h"

namespace fedlora::cuda {

struct SvdOptions {
  double energy;
  int64_t width;  // columns of the result
  bool fast;
};

struct SvdResult {
  void* b_g;       // [L, m, width] in the factors' type, zero beyond each module's rank
  void* a_g;       // [L, width, n]
  double* sigma;   // [L, R]
  int64_t* ranks;  // [L]
};

size_t stacked_svd_workspace(const Factors& b, const Factors& a, const SvdOptions& options,
                             Stream stream);

// scale [L, R]. Singular values of a module whose factors are not finite are NaN, and its rank 0.
// Everything goes through Gram matrices, so singular values under sqrt(R eps) of the largest count
// as zero, for float64 data too.
void stacked_svd(const Factors& b, const Factors& a, const double* scale, const SvdOptions& options,
                 const SvdResult& result, void* workspace, Stream stream);

}  // namespace fedlora::cuda
