// Two clients of ranks 2 and 3 train adapters of one 8 x 6 layer; FLoRIST combines them.
//
// Prints the rank and the relative error of the result against the weighted sum of the clients'
// updates, which it computes in full for comparison.
#include <fedlora/fedlora.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

struct Client {
  int64_t rank;
  double weight;         // its share of all examples
  double scaling;        // alpha / rank
  std::vector<float> b;  // [m, rank]
  std::vector<float> a;  // [rank, n]
};

int main() {
  const int64_t m = 8;
  const int64_t n = 6;
  std::mt19937 bits(0);
  std::normal_distribution<float> normal;
  std::vector<Client> clients = {{2, 0.6, 2.0, {}, {}}, {3, 0.4, 1.0, {}, {}}};
  for (Client& client : clients) {
    for (int64_t i = 0; i < m * client.rank; ++i) client.b.push_back(normal(bits));
    for (int64_t i = 0; i < client.rank * n; ++i) client.a.push_back(normal(bits));
  }

  // The factors where they lie, and weight times scaling once for each rank.
  std::vector<flk::Matrix> b;
  std::vector<flk::Matrix> a;
  std::vector<double> scale;
  for (const Client& client : clients) {
    b.push_back({client.b.data(), m, client.rank});
    a.push_back({client.a.data(), client.rank, n});
    scale.insert(scale.end(), static_cast<size_t>(client.rank), client.weight * client.scaling);
  }
  const auto stacked = static_cast<int64_t>(scale.size());

  std::vector<float> b_g(static_cast<size_t>(m * stacked));
  std::vector<float> a_g(static_cast<size_t>(stacked * n));
  std::vector<double> sigma(scale.size());
  int64_t rank = 0;
  flk::stacked_svd({flk::DType::fp32, 1, b}, {flk::DType::fp32, 1, a}, scale.data(), 0.99, stacked,
                   {b_g.data(), a_g.data(), sigma.data(), &rank});

  double missed = 0;
  double whole = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double ideal = 0;
      for (const Client& client : clients) {
        for (int64_t k = 0; k < client.rank; ++k) {
          ideal += client.weight * client.scaling *
                   static_cast<double>(client.b[static_cast<size_t>(i * client.rank + k)]) *
                   static_cast<double>(client.a[static_cast<size_t>(k * n + j)]);
        }
      }
      double found = 0;
      for (int64_t k = 0; k < rank; ++k) {
        found += static_cast<double>(b_g[static_cast<size_t>(i * stacked + k)]) *
                 static_cast<double>(a_g[static_cast<size_t>(k * n + j)]);
      }
      missed += (found - ideal) * (found - ideal);
      whole += ideal * ideal;
    }
  }
  std::printf("rank %d of %d, relative error %.4f\n", static_cast<int>(rank),
              static_cast<int>(stacked), std::sqrt(missed / whole));
}
