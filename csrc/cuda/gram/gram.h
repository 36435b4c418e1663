// gram: G = x x^T (A side) or x^T x (B side) of every module, in float64, on the device.
#pragma once

#include <cstddef>

#include "cuda/factors.h"

namespace fedlora::cuda {

size_t gram_workspace(const Factors& x, bool fast);

// out: [L, R, R], exactly symmetric. "fast" sums at most 64 terms in float32 before they go on in
// float64; it changes nothing for float64 data.
void gram(const Factors& x, bool fast, double* out, void* workspace, Stream stream);

}  // namespace fedlora::cuda
