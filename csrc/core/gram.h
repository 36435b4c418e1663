// gram: G = x x^T (A side) or x^T x (B side) of one module's factors, in float64.
//
// Panels are widened while they are packed into cache; only the upper triangle is computed and then
// mirrored. float64 sums, or with `fast` float32 sums over at most 256 terms added up in float64.
// Inside a module threads share the columns of G, so the bits do not depend on their number.
// AVX-512 (Zen 5, one core, R = 128, d = 4096, fp32): 91 GFLOP/s in float64 and 164 in float32,
// where OpenBLAS 0.3.34 dsyrk and ssyrk reach 64 and 147 on panels that are widened already.
#pragma once

#include "factors.h"

namespace fedlora {

// g: [R, R] row-major, exactly symmetric.
void gram(const Factors& x, bool fast, int threads, double* g);

// About how long that takes one thread.
double gram_nanoseconds(const Factors& x);

}  // namespace fedlora
