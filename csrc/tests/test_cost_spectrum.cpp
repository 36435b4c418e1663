// What the leading part of a spectrum costs beside the whole one, counted while the kernels run.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "accesses.h"
#include "cuda/spectrum/spectrum.h"
#include "emulator/emulator.h"
#include "matrices.h"

namespace fedlora::tests {
namespace {

struct Cost {
  double flops;
  double bytes;
  int64_t rank;  // singular values that were computed
};

// What a spectrum took before there was a leading part (commit ef2bfa0).
constexpr Cost kBefore128 = {103e6, 10.9e6, 0};
constexpr Cost kBefore512 = {2282e6, 1736e6, 0};

struct Grams {
  int64_t rank;
  Matrix b, a, scale;
};

// Clients of rank 16 that share A's start, as after a round; B of decaying columns.
Grams grams_of(int64_t clients, double noise) {
  const int64_t r = 16, rank = clients * r, depth = rank + 32;
  const Matrix own = random(rank, depth, 1), start = random(r, depth, 2);
  Matrix a(own.size()), b = random(rank, depth, 3);  // B transposed
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t j = 0; j < depth; ++j) {
      a[k * depth + j] = start[k % r * depth + j] + noise * own[k * depth + j];
      b[k * depth + j] *= std::exp(-0.2 * static_cast<double>(k % r));
    }
  }
  const auto gram = [&](const Matrix& x) {
    return product(x, transposed(x, rank, depth), rank, depth, rank);
  };
  const double weight = 1 / static_cast<double>(clients);
  return {rank, gram(b), gram(a), Matrix(static_cast<size_t>(rank), weight)};
}

Cost cost_of(const Grams& grams, const cuda::SpectrumOptions& options) {
  const int64_t rank = grams.rank;
  const auto square = static_cast<size_t>(rank * rank);
  Matrix sigma(static_cast<size_t>(rank)), total(1), left(square), right(square);
  Matrix workspace(cuda::spectrum_workspace(1, rank, {}) / sizeof(double) + 1);
  std::vector<int64_t> info(1);
  Accesses accesses;
  const Matrix* const device[] = {&grams.b, &grams.a, &grams.scale, &sigma,
                                  &total,   &left,    &right,       &workspace};
  for (const Matrix* matrix : device) {
    accesses.watch(matrix->data(), matrix->size() * sizeof(double));
  }
  const uint64_t before = emulator::fused;
  cuda::spectrum(1, rank, grams.b.data(), grams.a.data(), grams.scale.data(), options,
                 {sigma.data(), total.data(), left.data(), right.data(), info.data()},
                 workspace.data(), {});
  REQUIRE(info[0] == 0);
  Cost cost = {2.0 * static_cast<double>(emulator::fused - before),
               static_cast<double>(accesses.bytes()), 0};
  while (cost.rank < rank && sigma[static_cast<size_t>(cost.rank)] > 0) ++cost.rank;
  return cost;
}

}  // namespace

TEST_CASE("the leading part of a spectrum costs a fifth at R = 128 and a tenth at R = 512") {
  std::printf("    R    p      part: MFLOP      MB     whole: MFLOP      MB     flops  bytes\n");
  for (const int64_t clients : {8, 32}) {
    for (const double noise : {1e-2, 1e-1}) {
      const Grams grams = grams_of(clients, noise);
      const auto size = static_cast<double>(grams.rank);
      const Cost part = cost_of(grams, {.energy = 0.9});
      Cost whole = cost_of(grams, {});
      // The vendor's eigensolver, which stands outside the emulator: 9 R^3 flops, and its matrix
      // read and written once.
      if (clients == 32) whole.flops += 9 * size * size * size, whole.bytes += 16 * size * size;
      std::printf("%5.0f %4d %16.1f %7.1f %16.1f %7.1f %8.3f %6.3f\n", size,
                  static_cast<int>(part.rank), part.flops / 1e6, part.bytes / 1e6,
                  whole.flops / 1e6, whole.bytes / 1e6, part.flops / whole.flops,
                  part.bytes / whole.bytes);
      REQUIRE(part.rank <= 16);
      REQUIRE(part.rank > 0);
      const Cost& before = clients == 8 ? kBefore128 : kBefore512;
      const double most = clients == 8 ? 0.2 : 0.1;
      CHECK(part.flops <= most * before.flops);
      CHECK(part.bytes <= most * before.bytes);
      // A panel's product is made of whole tiles, also across the diagonal.
      CHECK(whole.flops <= 1.01 * before.flops);
      CHECK(whole.bytes <= (clients == 8 ? 1 : 0.45) * before.bytes);
    }
  }
}

}  // namespace fedlora::tests
