// copy: any strided array as a contiguous one, for callers whose layout a kernel cannot read.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace fedlora::cuda {

inline constexpr int kMostDimensions = 16;

struct Strided {
  const void* data;
  int dimensions;
  int64_t sizes[kMostDimensions];
  int64_t strides[kMostDimensions];  // in elements
};

// Elements of 2, 4 or 8 bytes as they are.
void copy(const Strided& from, int64_t bytes, void* to, Stream stream);

// float32 as float64.
void widen_floats(const Strided& from, double* to, Stream stream);

}  // namespace fedlora::cuda
