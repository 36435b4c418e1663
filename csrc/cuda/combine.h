// combine: the global factors of every module from the clients' and a rule's coefficients.
//
//   B_g = B X    [m, R] x [R, width]        A_g = Y A    [width, R] x [R, n]
#pragma once

#include <cstdint>

#include "factors.h"

namespace fedlora::cuda {

// X or Y: number (line i of the factors, column c of the result) of module l stands at
// data[l * module_stride + i * line_stride + c * column_stride].
struct Coefficients {
  const double* data;
  int64_t module_stride;
  int64_t line_stride;
  int64_t column_stride;
  int64_t columns;       // further ones count as zero
  const int64_t* ranks;  // as do those from ranks[l] on, where this is not null
};

// The side that x.rows tells: out is [L, m, width] for the B side, [L, width, n] for the A side, in
// the factors' type.
void combine(const Factors& x, const Coefficients& coefficients, int64_t width, void* out,
             Stream stream);

}  // namespace fedlora::cuda
