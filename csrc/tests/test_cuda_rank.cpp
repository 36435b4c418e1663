#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/rank.h"
#include "cuda/rank.h"
#include "matrices.h"

namespace fedlora::tests {
namespace {

std::vector<int64_t> ranks_of(int64_t rank, const Matrix& sigma, const Matrix& total, double energy,
                              int64_t cap) {
  std::vector<int64_t> ranks(total.size(), -1);
  cuda::select_rank(static_cast<int64_t>(total.size()), rank, sigma.data(), total.data(), energy,
                    cap, ranks.data(), {});
  return ranks;
}

}  // namespace

TEST_CASE("ranks on the device: the edges of the energy, zeros and the cap") {
  const double tiny = std::sqrt(4 * std::numeric_limits<double>::epsilon()) / 2;
  const Matrix sigma = {3, 2, 1, 1e-9, 0, 0, 0, 0, 2, 2, 2, 2, 1, tiny, tiny, tiny, 3, 2, 0, 0};
  const Matrix total = {14, 0, 16, 1, 17};
  using Ranks = std::vector<int64_t>;
  CHECK(ranks_of(4, sigma, total, 9.0 / 14, 4) == Ranks{1, 0, 3, 1, 2});
  CHECK(ranks_of(4, sigma, total, 9.01 / 14, 4) == Ranks{2, 0, 3, 1, 2});
  CHECK(ranks_of(4, sigma, total, 1.0, 4) == Ranks{3, 0, 4, 1, 2});
  CHECK(ranks_of(4, sigma, total, 1.0, 2) == Ranks{2, 0, 2, 1, 2});
  CHECK(ranks_of(4, sigma, total, 0.5, 4) == Ranks{1, 0, 2, 1, 1});
  CHECK(ranks_of(4, sigma, total, 1e-9, 100) == Ranks{1, 0, 1, 1, 1});
}

TEST_CASE("ranks on the device: more modules than a block has threads") {
  const int64_t modules = 77, rank = 19;
  Matrix sigma, total;
  for (int64_t module = 0; module < modules; ++module) {
    double sum = 0;
    for (int64_t i = 0; i < rank; ++i) {
      const double value =
          std::pow(0.5 + 0.005 * static_cast<double>(module), static_cast<double>(i));
      sigma.push_back(value);
      sum += value * value;
    }
    total.push_back(sum);
  }
  for (const double energy : {0.5, 0.9, 0.999999, 1.0}) {
    const std::vector<int64_t> ranks = ranks_of(rank, sigma, total, energy, 11);
    for (int64_t module = 0; module < modules; ++module) {
      // The definition, from the values.
      double sum = 0;
      int64_t p = 0;
      while (p < rank && sum < energy * total[module] * (1 - 1e-14)) {
        sum += std::pow(sigma[module * rank + p++], 2);
      }
      CHECK(ranks[module] == std::min<int64_t>(p, 11));
    }
  }
}

}  // namespace fedlora::tests
