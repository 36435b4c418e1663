#include "stacked_svd.h"

#include <algorithm>

#include "gram.h"
#include "spectrum.h"

namespace fedlora {

double stacked_svd_nanoseconds(const Factors& b, const Factors& a) {
  return gram_nanoseconds(b) + gram_nanoseconds(a) + spectrum_nanoseconds(b.rank);
}

void stacked_svd(const Factors& b, const Factors& a, const double* scale, const SvdOptions& options,
                 int threads, const SvdResult& result) {
  if (b.dtype == DType::fp64 && !options.fast) {
    svd_by_qr(b, a, scale, options, threads, result);
  } else if (b.rank >= std::min(b.depth, a.depth)) {
    svd_by_smaller_side(b, a, scale, options, threads, result);
  } else {
    svd_by_grams(b, a, scale, options, threads, result);
  }
}

}  // namespace fedlora
