// The vendor's batched symmetric eigensolver, cusolverDnXsyevBatched, found at run time so that the
// library loads without it; where there is no GPU, LAPACK's dsyevd stands in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"

namespace fedlora::cuda::vendor {

size_t symmetric_eigen_workspace(int64_t modules, int64_t n);

// matrices [L, n, n]: symmetric, then eigenvectors in their columns (each contiguous); values
// [L, n] ascending; info [L] on the device, 0 where converged. Where solved [L] is not 0 nothing is
// done; the host waits for it, as it has to say which matrices to take. It may be null. Throws
// std::runtime_error where the library is missing or too old. Not for a stream that is captured.
void symmetric_eigen(int64_t modules, int64_t n, const int* solved, double* matrices,
                     double* values, int* info, void* workspace, Stream stream);

}  // namespace fedlora::cuda::vendor
