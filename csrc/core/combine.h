// combine: the global factors from the clients' and a rule's coefficients, one pass over each side.
//
//   B_g = B X    [m, R] x [R, p]        A_g = Y A    [p, R] x [R, n]
//
// Products run in float64 (float32 with `single`) and are rounded once to the adapters' type.
// Coefficients hold `used` columns and rows; the outputs are zero from there to `width`.
// float64 (Zen 5, one core, R = 128, d = 4096, fp32 data): 91 GFLOP/s at p = 16, 102 at p = 64.
#pragma once

#include "factors.h"

namespace fedlora {

// X [R, used] and Y [used, R], row-major.
struct Coefficients {
  const double* x;
  const double* y;
  int64_t used;
  int64_t width;  // of the results
};

// Both sides, by one team: b_g [m, width] in B's type, a_g [width, n] in A's.
void combine(const Factors& b, const Factors& a, const Coefficients& coefficients, bool single,
             int threads, void* b_g, void* a_g);

// About how long a side takes one thread.
double combine_nanoseconds(const Factors& x, int64_t used);

// x [R, used] row-major, out [m, width] in B's type.
void combine_left(const Factors& b, const double* x, int64_t used, int64_t width, bool single,
                  int threads, void* out);

// y [used, R] row-major, out [width, n] in A's type.
void combine_right(const Factors& a, const double* y, int64_t used, int64_t width, bool single,
                   int threads, void* out);

}  // namespace fedlora
