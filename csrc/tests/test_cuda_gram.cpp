#include <doctest/doctest.h>

#include <algorithm>

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

}  // namespace
}  // namespace fedlora::tests
