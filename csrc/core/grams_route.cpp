// stacked_svd for R < min(m, n): the adapters are read twice, everything between is R x R.
//
// "fast" forms the Grams in float32 and takes the right vectors from the left ones,
// Y = S^-2 X^T G_B D, because a float32 Gram has no small pivots to divide by.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "combine.h"
#include "gram.h"
#include "lapack.h"
#include "memory.h"
#include "parallel.h"
#include "rank.h"
#include "spectrum.h"
#include "stacked_svd.h"

namespace fedlora {
namespace {

constexpr double kSingleEps = std::numeric_limits<float>::epsilon();

void right_from_left(int64_t rank, int64_t p, const double* x, const double* gram_b,
                     const double* scale, const double* sigma, double* y) {
  if (p == 0) return;
  // Row-major y [p, R] = x^T G_B is column-major [R, p] = G_B x with x^T given as [p, R].
  lapack::gemm(false, true, rank, p, rank, 1, gram_b, rank, x, p, 0, y, rank);
  for (int64_t c = 0; c < p; ++c) {
    for (int64_t i = 0; i < rank; ++i) y[c * rank + i] *= scale[i] / (sigma[c] * sigma[c]);
  }
}

}  // namespace

void svd_by_grams(const Factors& b, const Factors& a, const double* scale,
                  const SvdOptions& options, int threads, const SvdResult& result) {
  const int64_t rank = b.rank;
  const Buffer<double> gram_b(rank * rank);
  const Buffer<double> gram_a(rank * rank);
  parallel_for(2, team(gram_nanoseconds(b) + gram_nanoseconds(a), threads), [&](int64_t side) {
    gram(side == 0 ? b : a, options.fast, threads / 2, (side == 0 ? gram_b : gram_a).get());
  });

  const bool rounded = options.fast && b.dtype != DType::fp64;
  const double noise = rounded ? 4 * kSingleEps : 0;
  const Spectrum spectrum(rank, gram_b.get(), gram_a.get(), scale, noise, options.energy,
                          options.width);
  if (!spectrum.converged()) {
    throw std::runtime_error(
        "the factors hold values that are not finite, or overflow in products");
  }
  // Under this sigma^2 is float32 rounding where clients cancel.
  const double floor = options.fast ? kSingleEps / 16 * spectrum.terms() : 0;
  for (int64_t i = 0; i < rank; ++i) {
    const double sigma = spectrum.sigma()[i];
    result.sigma[i] = sigma * sigma > floor ? sigma : 0;
  }
  const int64_t p =
      select_rank(result.sigma, rank, spectrum.total_energy(), options.energy, options.width);
  *result.rank = p;

  const Buffer<double> x(rank * p);
  const Buffer<double> y(rank * p);
  spectrum.left(p, x.get());
  if (options.fast) {
    right_from_left(rank, p, x.get(), gram_b.get(), scale, spectrum.sigma(), y.get());
  } else {
    spectrum.right(p, y.get());
  }
  combine(b, a, {x.get(), y.get(), p, options.width}, options.fast, threads, result.b_g,
          result.a_g);
}

}  // namespace fedlora
