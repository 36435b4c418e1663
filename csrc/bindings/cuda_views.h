// Arrays in device memory as the kernels read them: factors where they lie, coefficients as
// contiguous float64.
#pragma once

#include "array.h"
#include "cuda/factors.h"
#include "cuda/weighted_sum.h"

namespace fedlora::cuda {

Stream stream_of(const Host& host);

// One side of L modules: a stack [L,R,d] or [L,d,R], or module-major lists of matrices. Only where
// the last dimension is not contiguous a copy is read in their place.
Factors side(const Host& host, const Array& stacked, bool rows);
Factors side(const Host& host, const Arrays& list, int64_t modules, bool rows);

// float32 or float64 values as contiguous float64; the array itself where it is that.
const double* doubles(const Host& host, const Array& array);

// The sums over axis 1 of a stack [L,K,...], and over K tensors for each of L modules.
Sources sources(const Host& host, const Array& stacked);
Sources sources(const Host& host, const Arrays& list, int64_t modules);

}  // namespace fedlora::cuda
