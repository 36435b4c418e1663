#include "client_products.h"

#include <algorithm>
#include <numeric>

#include "kernels.h"
#include "parallel.h"

namespace fedlora {
namespace {

// Up to this rank whole rows are read, and half of the products are not used: the processor fetches
// memory ahead only where it is read without gaps.
constexpr int64_t kShort = 512;

// Bytes a nanosecond that count as a thread's. One alone reads 25, and a second one adds little: it
// is worth its start where there is more to read.
constexpr double kBandwidth = 100;

}  // namespace

double client_products_nanoseconds(int64_t rank) {
  const auto square = static_cast<double>(rank) * static_cast<double>(rank);
  return (rank <= kShort ? 2 : 1) * square * sizeof(double) / kBandwidth;
}

void client_products(std::span<const int64_t> ranks, const double* gram_b, const double* gram_a,
                     const double* scale, int threads, double* products) {
  const Kernels& kernel = kernels();
  const auto clients = static_cast<int64_t>(ranks.size());
  const int64_t rank = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
  const int team_of = team(client_products_nanoseconds(rank), threads);
  parallel_for(clients, team_of, [&](int64_t client) {
    const int64_t start = std::accumulate(ranks.begin(), ranks.begin() + client, int64_t{0});
    double* own = products + client * clients;
    const int64_t others = rank <= kShort ? clients : client + 1;
    std::fill_n(own, others, 0.0);
    for (int64_t row = start; row < start + ranks[client]; ++row) {
      kernel.add_products(ranks.data(), others, gram_b + row * rank, gram_a + row * rank, own);
    }
    for (int64_t other = 0; other <= client; ++other) own[other] *= scale[client] * scale[other];
  });
  for (int64_t client = 0; client < clients; ++client) {
    for (int64_t other = 0; other < client; ++other) {
      products[other * clients + client] = products[client * clients + other];
    }
  }
}

}  // namespace fedlora
