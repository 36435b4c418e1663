// surrogate: FLoRA-NA's mixing weights, all sweeps in one launch; the algorithm is that of
// core/surrogate.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/surrogate.h"
#include "cuda/device.cuh"

namespace fedlora::cuda {

size_t surrogate_workspace(int64_t modules, int64_t clients, int64_t rank, int64_t max_sweeps);

// Grams [modules, R, R] of the unscaled factors, R = clients * rank; weights [clients]; scale
// [modules, clients]. p and q [modules, clients], objective [modules, max_sweeps + 1].
void surrogate(int64_t modules, int64_t clients, int64_t rank, const double* gram_b,
               const double* gram_a, const double* weights, const double* scale,
               const SurrogateOptions& options, double* p, double* q, double* objective,
               void* workspace, Stream stream);

}  // namespace fedlora::cuda
