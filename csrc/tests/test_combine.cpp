#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "core/combine.h"
#include "matrices.h"

namespace fedlora::tests {

TEST_CASE("global factors from coefficients, zero beyond those in use") {
  const std::vector<int64_t> ranks = {5, 12, 3};
  const int64_t rank = 20;
  for (const int64_t depth : {1, 63, 1030}) {
    for (const int64_t used : {0, 1, 9, 33}) {
      for (const DType dtype : {DType::bf16, DType::fp16, DType::fp32, DType::fp64}) {
        for (const bool single : {false, true}) {
          const int64_t width = used + 2;
          const double eps = dtype == DType::bf16   ? 0x1p-8
                             : dtype == DType::fp16 ? 0x1p-11
                             : dtype == DType::fp32 ? 0x1p-24
                                                    : 0x1p-53;
          const double bound = rank * (eps + (single && dtype != DType::fp64 ? 0x1p-24 : 0));
          const Matrix b = rounded(random(depth, rank, 2), dtype);
          const Matrix a = rounded(random(rank, depth, 3), dtype);
          const Matrix x = random(rank, used, 4);
          const Matrix y = random(used, rank, 5);
          const Side left(b, false, ranks, depth, dtype);
          const Side right(a, true, ranks, depth, dtype);
          std::vector<char> out(static_cast<size_t>(depth * width * bytes_of(dtype)), 1);
          combine_left(left.factors(), x.data(), used, width, single, 2, out.data());
          const Matrix b_g = widened(out, dtype);
          const Matrix expected_b = product(b, x, depth, rank, used);
          std::fill(out.begin(), out.end(), 1);
          combine_right(right.factors(), y.data(), used, width, single, 2, out.data());
          const Matrix a_g = widened(out, dtype);
          const Matrix expected_a = product(y, a, used, rank, depth);
          for (int64_t i = 0; i < depth; ++i) {
            for (int64_t j = 0; j < width; ++j) {
              const double in_b = j < used ? expected_b[i * used + j] : 0;
              const double in_a = j < used ? expected_a[j * depth + i] : 0;
              REQUIRE(std::abs(b_g[i * width + j] - in_b) <= bound * 4);
              REQUIRE(std::abs(a_g[j * depth + i] - in_a) <= bound * 4);
              if (j >= used) {
                REQUIRE(b_g[i * width + j] == 0);
                REQUIRE(a_g[j * depth + i] == 0);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace fedlora::tests
