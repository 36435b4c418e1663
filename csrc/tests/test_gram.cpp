#include <doctest/doctest.h>

#include <algorithm>

#include "core/gram.h"
#include "matrices.h"

namespace fedlora::tests {

TEST_CASE("the Gram matrix of clients where they lie") {
  struct Shape {
    std::vector<int64_t> ranks;
    int64_t depth;
  };
  const Shape shapes[] = {{{1}, 1},    {{7}, 5},         {{4, 1, 9}, 300}, {{16, 16}, 128},
                          {{40}, 257}, {{8, 0, 8}, 129}, {{33, 70}, 1000}};
  for (const auto& [ranks, depth] : shapes) {
    int64_t rank = 0;
    for (const int64_t r : ranks) rank += r;
    for (const DType dtype : {DType::bf16, DType::fp16, DType::fp32, DType::fp64}) {
      for (const bool rows : {false, true}) {
        const Matrix x = rounded(rows ? random(rank, depth, 1) : random(depth, rank, 1), dtype);
        const Side side(x, rows, ranks, depth, dtype);
        const Matrix flipped = transposed(x, rows ? rank : depth, rows ? depth : rank);
        const Matrix expected =
            rows ? product(x, flipped, rank, depth, rank) : product(flipped, x, rank, depth, rank);
        for (const bool fast : {false, true}) {
          Matrix g(static_cast<size_t>(rank * rank));
          gram(side.factors(), fast, 1, g.data());
          const double eps = fast && dtype != DType::fp64 ? 0x1p-23 : 0x1p-52;
          CHECK(distance(g, expected) <=
                8 * std::min<double>(256.0, depth) * eps * largest(expected));
          CHECK(g == transposed(g, rank, rank));
          Matrix shared(g.size());
          gram(side.factors(), fast, 3, shared.data());
          CHECK(g == shared);
        }
      }
    }
  }
}

}  // namespace fedlora::tests
