#include <doctest/doctest.h>

#include <cstddef>

#include "core/weighted_sum.h"
#include "matrices.h"

namespace fedlora::tests {

TEST_CASE("averages of sources in rows of any stride") {
  const std::vector<double> weights = {0.25, -1.5, 3.0};
  for (const int64_t rows : {1, 6, 70000}) {
    for (const int64_t columns : {1, 3, 130}) {
      if (rows * columns > 300000) continue;
      for (const DType dtype : {DType::bf16, DType::fp32, DType::fp64}) {
        for (const int64_t gap : {0, 5}) {
          const int64_t stride = columns + gap;
          std::vector<std::vector<char>> memory;
          std::vector<const void*> sources;
          Matrix expected(static_cast<size_t>(rows * columns), 0.0);
          for (size_t k = 0; k < weights.size(); ++k) {
            const Matrix source = rounded(random(rows, stride, k + 1), dtype);
            memory.push_back(narrowed(source, dtype));
            sources.push_back(memory.back().data());
            for (int64_t i = 0; i < rows; ++i) {
              for (int64_t j = 0; j < columns; ++j) {
                expected[i * columns + j] += weights[k] * source[i * stride + j];
              }
            }
          }
          const std::vector<int64_t> strides(3, stride);
          std::vector<char> out(static_cast<size_t>(rows * columns * bytes_of(dtype)));
          weighted_sum(dtype, {sources.data(), strides.data(), 3, rows, columns}, weights.data(), 2,
                       out.data());
          const double eps = dtype == DType::bf16   ? 0x1p-8
                             : dtype == DType::fp32 ? 0x1p-24
                                                    : 0x1p-52;
          CHECK(distance(widened(out, dtype), expected) <= 8 * eps);
        }
      }
    }
  }
}

}  // namespace fedlora::tests
