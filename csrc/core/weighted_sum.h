// weighted_sum: out = sum_k w_k source_k, one pass at memory bandwidth.
//
// Accumulated in float64 registers over blocks of 64 elements, rounded once to the factors' type.
#pragma once

#include <cstdint>

#include "factors.h"

namespace fedlora {

// Sources of one module: `rows` runs of `columns` contiguous elements, `stride` apart.
struct Runs {
  const void* const* sources;
  const int64_t* strides;  // per source
  int64_t count;
  int64_t rows;
  int64_t columns;
};

// About how long that takes one thread.
double weighted_sum_nanoseconds(DType dtype, const Runs& runs);

// out: [rows, columns] contiguous.
void weighted_sum(DType dtype, const Runs& runs, const double* weights, int threads, void* out);

}  // namespace fedlora
