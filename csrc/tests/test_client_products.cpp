#include <doctest/doctest.h>

#include <cstddef>
#include <numeric>

#include "core/client_products.h"
#include "matrices.h"

namespace fedlora::tests {

TEST_CASE("inner products of clients of any ranks") {
  for (const std::vector<int64_t>& ranks :
       {std::vector<int64_t>{1}, {5, 0, 3}, {16, 16, 16}, {1, 130, 7, 33}, {700, 2}}) {
    const auto clients = static_cast<int64_t>(ranks.size());
    const int64_t rank = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
    const Matrix gram_b = random(rank, rank, 1);
    const Matrix gram_a = random(rank, rank, 2);
    const Matrix scale = random(1, clients, 3);
    Matrix expected(static_cast<size_t>(clients * clients));
    int64_t row = 0;
    for (int64_t j = 0; j < clients; ++j) {
      for (int64_t i = 0; i < ranks[static_cast<size_t>(j)]; ++i, ++row) {
        int64_t entry = row * rank;
        for (int64_t k = 0; k <= j; ++k) {
          for (int64_t t = 0; t < ranks[static_cast<size_t>(k)]; ++t, ++entry) {
            expected[static_cast<size_t>(j * clients + k)] +=
                scale[static_cast<size_t>(j)] * scale[static_cast<size_t>(k)] *
                gram_b[static_cast<size_t>(entry)] * gram_a[static_cast<size_t>(entry)];
          }
        }
      }
      for (int64_t k = 0; k < j; ++k) {
        expected[static_cast<size_t>(k * clients + j)] =
            expected[static_cast<size_t>(j * clients + k)];
      }
    }
    Matrix first;
    for (const int threads : {1, 3}) {
      Matrix products(expected.size(), -1.0);
      client_products(ranks, gram_b.data(), gram_a.data(), scale.data(), threads, products.data());
      CHECK(distance(products, expected) <= 1e-13 * static_cast<double>(rank));
      if (first.empty()) first = products;
      CHECK(products == first);
    }
  }
}

}  // namespace fedlora::tests
