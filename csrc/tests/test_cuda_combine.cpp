#include <doctest/doctest.h>

#include <cstdio>

#include "cuda/combine.h"
#include "cuda_side.h"

namespace fedlora::tests {
namespace {

using emulator::kH200;
using emulator::Setting;

struct Shape {
  std::vector<int64_t> ranks;
  int64_t depth;
  int64_t columns;
  int64_t width;
};

std::vector<char> combined(const cuda::Factors& x, const cuda::Coefficients& coefficients,
                           int64_t width) {
  std::vector<char> out(static_cast<size_t>(x.modules * x.depth * width * bytes_of(x.dtype)),
                        '\xFF');
  cuda::combine(x, coefficients, width, out.data(), {});
  return out;
}

TEST_CASE("products of clients where they lie") {
  const Shape shapes[] = {{{1}, 1, 1, 1},
                          {{4, 1, 9}, 130, 5, 7},
                          {{16, 16}, 64, 32, 32},
                          {{8, 0, 8}, 129, 16, 20},
                          {{33, 40}, 300, 70, 70}};
  constexpr int64_t kModules = 2;
  for (const auto& [ranks, depth, columns, width] : shapes) {
    int64_t rank = 0;
    for (const int64_t r : ranks) rank += r;
    const int64_t used[kModules] = {columns, columns / 2};
    for (const DType dtype : {DType::bf16, DType::fp16, DType::fp32, DType::fp64}) {
      for (const bool rows : {false, true}) {
        std::vector<Matrix> stacked;
        Matrix coefficients;
        Matrix expected;
        for (int64_t module = 0; module < kModules; ++module) {
          const Matrix x =
              rounded(rows ? random(rank, depth, module) : random(depth, rank, module), dtype);
          Matrix c = rows ? random(columns, rank, 7) : random(rank, columns, 7);
          coefficients.insert(coefficients.end(), c.begin(), c.end());
          for (int64_t i = 0; i < rank * columns; ++i) {  // what the ranks leave out
            if ((rows ? i / rank : i % columns) >= used[module]) c[i] = 0;
          }
          const Matrix full =
              rows ? product(c, x, columns, rank, depth) : product(x, c, depth, rank, columns);
          Matrix padded(static_cast<size_t>(depth * width));
          for (int64_t d = 0; d < depth; ++d) {
            for (int64_t j = 0; j < columns; ++j) {
              padded[rows ? j * depth + d : d * width + j] =
                  full[rows ? j * depth + d : d * columns + j];
            }
          }
          expected.insert(expected.end(), padded.begin(), padded.end());
          stacked.push_back(x);
        }
        const CudaSide side(stacked, rows, ranks, depth, dtype);
        const cuda::Coefficients given = {coefficients.data(), rank * columns, rows ? 1 : columns,
                                          rows ? rank : 1,     columns,        used};
        const std::vector<char> out = combined(side.factors(), given, width);
        // Products of half-precision numbers and float64 coefficients, summed in another order.
        const double eps = dtype == DType::fp64   ? 0x1p-50
                           : dtype == DType::fp32 ? 0x1p-24
                           : dtype == DType::fp16 ? 0x1p-11
                                                  : 0x1p-8;
        CHECK(distance(widened(out, dtype), expected) <=
              (1 + 0x1p-20) * eps * (dtype == DType::fp64 ? rank : 1) * largest(expected));
        const Setting setting(kH200, 9);
        CHECK(combined(side.factors(), given, width) == out);
      }
    }
  }
}

TEST_CASE("a block keeps its coefficients over several tiles, and reads only those wanted") {
  // On one multiprocessor a block takes all the tiles it can, and with little shared memory one.
  constexpr cuda::Device kOne = {1, emulator::kH200.shared_per_block, 90};
  constexpr cuda::Device kTight = {1, 96 * 1024, 90};
  constexpr int64_t kRank = 128, kDepth = 3000, kTiles = 24, kBlocks = 8;
  std::printf("combine  p  MB of factors, coefficients kept, and again for every tile\n");
  for (const DType dtype : {DType::bf16, DType::fp32, DType::fp64}) {
    for (const bool rows : {false, true}) {
      for (const int64_t width : {5, 64}) {
        const Matrix x = rows ? random(kRank, kDepth, 1) : random(kDepth, kRank, 1);
        const CudaSide side({rounded(x, dtype)}, rows, {96, 32}, kDepth, dtype);
        const Matrix c = random(kRank, width, 2);
        for (const int64_t used : {int64_t{0}, width}) {
          const cuda::Coefficients given = {c.data(), 0, width, 1, width, &used};
          const auto copied = [&](const cuda::Device& device, std::vector<char>& out) {
            const Setting setting(device);
            const uint64_t before = emulator::copied;
            out = combined(side.factors(), given, width);
            return emulator::copied - before;
          };
          std::vector<char> out, other;
          const uint64_t kept = copied(kOne, out);
          const uint64_t again = copied(kTight, other);
          CHECK(out == other);
          const uint64_t coefficients = static_cast<uint64_t>(kRank * used) * sizeof(double);
          if (used == 0) {
            CHECK(kept == 0);
            continue;
          }
          // Not all factors are aligned, and only those that are come asynchronously.
          const uint64_t factors = again - kTiles * coefficients;
          if (dtype == DType::bf16) {
            std::printf("%s %8d %13.2f %18.2f %22.2f\n", rows ? "A" : "B", static_cast<int>(used),
                        kRank * kDepth * 2 / 1e6, (kept - factors) / 1e6,
                        kTiles * coefficients / 1e6);
          }
          CHECK(kept - factors == kBlocks * coefficients);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fedlora::tests
