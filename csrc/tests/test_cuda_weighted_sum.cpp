#include <doctest/doctest.h>

#include "cuda/weighted_sum.h"
#include "matrices.h"

namespace fedlora::tests {
namespace {

TEST_CASE("weighted sums of stacks and lists, aligned or not") {
  constexpr int64_t kModules = 2;
  constexpr int64_t kRows = 3;
  for (const int64_t clients : {1, 4, 7}) {
    for (const int64_t columns : {1, 8, 33}) {
      for (const int64_t gap : {0, 1, 8}) {
        for (const DType dtype : {DType::bf16, DType::fp16, DType::fp32, DType::fp64}) {
          const int64_t stride = columns + gap;
          const Matrix x = rounded(random(kModules * clients * kRows, stride, 1), dtype);
          const std::vector<char> memory = narrowed(x, dtype);
          const Matrix weights = random(kModules, clients, 2);
          const Matrix factors = random(kModules, clients, 3);
          Matrix expected(kModules * kRows * columns);
          for (int64_t l = 0; l < kModules; ++l) {
            for (int64_t k = 0; k < clients; ++k) {
              for (int64_t i = 0; i < kRows * columns; ++i) {
                expected[l * kRows * columns + i] +=
                    weights[l * clients + k] * factors[l * clients + k] *
                    x[((l * clients + k) * kRows + i / columns) * stride + i % columns];
              }
            }
          }
          std::vector<cuda::Source> table;
          for (int64_t i = 0; i < kModules * clients; ++i) {
            table.push_back({memory.data() + i * kRows * stride * bytes_of(dtype), stride});
          }
          const cuda::Sources stack = {dtype,
                                       kModules,
                                       clients,
                                       kRows,
                                       columns,
                                       memory.data(),
                                       clients * kRows * stride,
                                       kRows * stride,
                                       stride,
                                       nullptr};
          cuda::Sources list = stack;
          list.data = nullptr;
          list.table = table.data();
          const cuda::Weights both = {weights.data(), clients, factors.data()};
          std::vector<char> out(expected.size() * static_cast<size_t>(bytes_of(dtype)));
          std::vector<char> listed(out.size());
          cuda::weighted_sum(stack, both, out.data(), {});
          cuda::weighted_sum(list, both, listed.data(), {});
          CHECK(out == listed);
          const double eps = dtype == DType::fp64   ? 0x1p-48
                             : dtype == DType::fp32 ? 0x1p-24
                             : dtype == DType::fp16 ? 0x1p-11
                                                    : 0x1p-8;
          CHECK(distance(widened(out, dtype), expected) <= (1 + 0x1p-20) * eps * largest(expected));
        }
      }
    }
  }
}

}  // namespace
}  // namespace fedlora::tests
