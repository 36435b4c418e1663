#include <doctest/doctest.h>

#include <cstddef>
#include <numeric>

#include "core/client_products.h"
#include "cuda/client_products.h"
#include "matrices.h"

namespace fedlora::tests {

TEST_CASE("inner products on the device: any ranks, and more clients than a launch takes") {
  constexpr int64_t kModules = 2;
  for (const std::vector<int64_t>& ranks : {std::vector<int64_t>{1},
                                            {5, 0, 3},
                                            {16, 16, 16},
                                            {1, 70, 7, 33},
                                            std::vector<int64_t>(130, 1)}) {
    const auto clients = static_cast<int64_t>(ranks.size());
    const int64_t rank = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
    const Matrix gram_b = random(kModules * rank, rank, 1);
    const Matrix gram_a = random(kModules * rank, rank, 2);
    const Matrix scale = random(kModules, clients, 3);
    Matrix products(static_cast<size_t>(kModules * clients * clients), -1.0);
    cuda::client_products(kModules, ranks, gram_b.data(), gram_a.data(), scale.data(),
                          products.data(), {});
    Matrix expected(products.size());
    for (int64_t l = 0; l < kModules; ++l) {
      client_products(ranks, gram_b.data() + l * rank * rank, gram_a.data() + l * rank * rank,
                      scale.data() + l * clients, 1, expected.data() + l * clients * clients);
    }
    CHECK(distance(products, expected) <= 1e-13 * static_cast<double>(rank));
  }
}

}  // namespace fedlora::tests
