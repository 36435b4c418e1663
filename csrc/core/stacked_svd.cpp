#include "stacked_svd.h"

#include <algorithm>

#include "gram.h"
#include "spectrum.h"

namespace fedlora {

double stacked_svd_nanoseconds(const Factors& b, const Factors& a) {
  return gram_nanoseconds(b) + gram_nanoseconds(a) + spectrum_nanoseconds(b.rank);
}

Route route_of(bool fp64, bool fast, int64_t rank, int64_t smaller) {
  if (fp64 && !fast) return Route::kQr;
  return rank >= smaller ? Route::kSmallerSide : Route::kGrams;
}

void stacked_svd(const Factors& b, const Factors& a, const double* scale, const SvdOptions& options,
                 int threads, const SvdResult& result) {
  const int64_t smaller = std::min(b.depth, a.depth);
  switch (route_of(b.dtype == DType::fp64, options.fast, b.rank, smaller)) {
    case Route::kQr:
      return svd_by_qr(b, a, scale, options, threads, result);
    case Route::kSmallerSide:
      return svd_by_smaller_side(b, a, scale, options, threads, result);
    case Route::kGrams:
      return svd_by_grams(b, a, scale, options, threads, result);
  }
}

}  // namespace fedlora
