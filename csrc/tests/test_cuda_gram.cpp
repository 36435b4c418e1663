#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <numeric>

#include "cuda/gram/gram.h"
#include "cuda_side.h"

namespace fedlora::tests {
namespace {

using emulator::kA100;
using emulator::kH200;
using emulator::Setting;

struct Shape {
  std::vector<int64_t> ranks;
  int64_t depth;
};

Matrix gram_of(const cuda::Factors& x, bool fast) {
  Matrix workspace(cuda::gram_workspace(x, fast) / sizeof(double), NAN);
  Matrix out(static_cast<size_t>(x.modules * x.rank * x.rank), NAN);
  cuda::gram(x, fast, out.data(), workspace.data(), {});
  return out;
}

TEST_CASE("the Gram matrices of clients where they lie") {
  const Shape shapes[] = {{{1}, 1},        {{7}, 5},         {{4, 1, 9}, 300},
                          {{16, 16}, 128}, {{33, 70}, 1000}, {{8, 0, 8}, 129}};
  constexpr int64_t kModules = 2;
  for (const auto& [ranks, depth] : shapes) {
    int64_t rank = 0;
    for (const int64_t r : ranks) rank += r;
    for (const DType dtype : {DType::bf16, DType::fp16, DType::fp32, DType::fp64}) {
      for (const bool rows : {false, true}) {
        std::vector<Matrix> stacked;
        Matrix expected;
        for (int64_t module = 0; module < kModules; ++module) {
          const Matrix x = rounded(
              rows ? random(rank, depth, module + 1) : random(depth, rank, module + 1), dtype);
          const Matrix flipped = transposed(x, rows ? rank : depth, rows ? depth : rank);
          const Matrix g = rows ? product(x, flipped, rank, depth, rank)
                                : product(flipped, x, rank, depth, rank);
          expected.insert(expected.end(), g.begin(), g.end());
          stacked.push_back(x);
        }
        const CudaSide side(stacked, rows, ranks, depth, dtype);
        for (const bool fast : {false, true}) {
          const Matrix g = gram_of(side.factors(), fast);
          const double eps = fast && dtype != DType::fp64 ? 0x1p-23 : 0x1p-52;
          CHECK(distance(g, expected) <=
                8 * std::min<double>(512.0, depth) * eps * largest(expected));
          for (int64_t module = 0; module < kModules; ++module) {
            const Matrix one(g.begin() + module * rank * rank,
                             g.begin() + (module + 1) * rank * rank);
            CHECK(one == transposed(one, rank, rank));
          }
          for (const uint64_t seed : {5, 6}) {
            const Setting setting(kH200, seed);
            CHECK(gram_of(side.factors(), fast) == g);
          }
        }
      }
    }
  }
}

TEST_CASE("stacks need no table, and both kinds of device give one result") {
  constexpr int64_t kRank = 24;
  constexpr int64_t kDepth = 4500;  // several shares
  for (const bool rows : {false, true}) {
    const Matrix x = random(rows ? 2 * kRank : 2 * kDepth, rows ? kDepth : kRank, 3);
    const std::vector<char> memory = narrowed(x, DType::fp32);
    const cuda::Factors stack = {
        DType::fp32,           rows,    2, kRank, kDepth, memory.data(), kRank * kDepth,
        rows ? kDepth : kRank, nullptr, 0};
    const Matrix rounded_x = rounded(x, DType::fp32);
    const auto middle = rounded_x.begin() + kRank * kDepth;
    const CudaSide side({Matrix(rounded_x.begin(), middle), Matrix(middle, rounded_x.end())}, rows,
                        {8, 16}, kDepth, DType::fp32);
    const Matrix g = gram_of(stack, false);
    CHECK(gram_of(side.factors(), false) == g);
    CHECK(cuda::gram_workspace(stack, false) > 0);
    const Setting setting(kA100);
    CHECK(distance(gram_of(stack, false), g) <= 1e-12 * largest(g));
  }
}

TEST_CASE("the four schedulers of a multiprocessor share the products evenly") {
  // With a quadrant for each warp, those on the diagonal take 8 of 8 tensor-core tiles and the
  // fourth none: the busiest scheduler has 4/3 of its share at R = 64, 6/5 at R = 128.
  std::printf(
      "gram      R  million products  busiest scheduler / mean, with a quadrant for each\n");
  for (const int64_t rank : {64, 128, 256}) {
    constexpr int64_t kDepth = 256;
    for (const bool rows : {false, true}) {
      const Matrix x = rows ? random(rank, kDepth, 1) : random(kDepth, rank, 1);
      const CudaSide side({x}, rows, {rank}, kDepth, DType::bf16);
      std::ranges::fill(emulator::on_scheduler, 0);
      gram_of(side.factors(), false);
      const auto& each = emulator::on_scheduler;
      const auto all = static_cast<double>(std::accumulate(each, each + 4, uint64_t{0}));
      const double busiest = 4 * static_cast<double>(*std::max_element(each, each + 4)) / all;
      const auto tiles = static_cast<double>(rank) / 64;
      const double quadrants =
          (tiles * (tiles - 1) / 2 + tiles) / (tiles * (tiles - 1) / 2 + tiles * 3 / 4);
      std::printf("%s %6d %17.1f %24.3f %22.3f\n", rows ? "A " : "B ", static_cast<int>(rank),
                  all / 1e6, busiest, quadrants);
      CHECK(busiest == 1);
      // What three of the four quadrants of a tile on the diagonal take, and no more.
      CHECK(all == kDepth * 4096.0 * (tiles * (tiles - 1) / 2 + tiles * 3 / 4));
    }
  }
}

}  // namespace
}  // namespace fedlora::tests
