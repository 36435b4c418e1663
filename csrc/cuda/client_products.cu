// Formula: client_products.h.
//
// Layout     A warp makes one product: its lanes walk the rows of a block of both matrices, 128
//            bytes of each a step where a rank is 16. Of a pair and its mirror one is made, so the
//            lower triangles are read once: 124 MB for 224 modules of R = 256.
// Where      Clients start is an argument of the launch, kGroup clients at a time, which a captured
//            graph keeps and which no copy has to precede.
// Precision  float64, in an order that the ranks alone decide; no shared memory.
#include <algorithm>
#include <vector>

#include "client_products.h"

namespace fedlora::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kGroup = 128;

struct Group {
  int64_t first;           // client
  int count;               // of clients
  int starts[kGroup + 1];  // in the stacked rank, and where the last one ends
};

__global__ void __launch_bounds__(kWarps * 32)
    pairs(int64_t modules, int64_t clients, int64_t rank, Group of_rows, Group of_columns,
          const double* gram_b, const double* gram_a, const double* scale, double* products) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t module = number / (of_rows.count * of_columns.count);
  const int row = static_cast<int>(number / of_columns.count % of_rows.count);
  const int column = static_cast<int>(number % of_columns.count);
  const int64_t j = of_rows.first + row;
  const int64_t k = of_columns.first + column;
  if (module >= modules || k > j) return;
  const int height = of_rows.starts[row + 1] - of_rows.starts[row];
  const int width = of_columns.starts[column + 1] - of_columns.starts[column];
  const int64_t corner = (module * rank + of_rows.starts[row]) * rank + of_columns.starts[column];
  const int64_t entries = static_cast<int64_t>(height) * width;
  // A step of a warp, as rows and columns: one division a thread, none an entry.
  const int step_y = 32 / max(width, 1);
  const int step_x = 32 - step_y * width;
  int64_t y = lane / max(width, 1);
  int x = lane % max(width, 1);
  double sum = 0;
#pragma unroll 4
  for (int64_t entry = lane; entry < entries; entry += 32) {
    const int64_t at = corner + y * rank + x;
    sum = fma(gram_b[at], gram_a[at], sum);
    y += step_y;
    x += step_x;
    if (x >= width) {
      x -= width;
      ++y;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane != 0) return;
  const double* scales = scale + module * clients;
  const double product = sum * (scales[j] * scales[k]);
  products[(module * clients + j) * clients + k] = product;
  products[(module * clients + k) * clients + j] = product;
}

}  // namespace

void client_products(int64_t modules, std::span<const int64_t> ranks, const double* gram_b,
                     const double* gram_a, const double* scale, double* products, Stream stream) {
  const auto clients = static_cast<int64_t>(ranks.size());
  std::vector<Group> groups;
  int64_t rank = 0;
  for (int64_t first = 0; first < clients; first += kGroup) {
    Group& group = groups.emplace_back();
    group.first = first;
    group.count = static_cast<int>(std::min<int64_t>(kGroup, clients - first));
    for (int i = 0; i <= group.count; ++i) {
      group.starts[i] = static_cast<int>(rank);
      if (i < group.count) rank += ranks[static_cast<size_t>(first + i)];
    }
  }
  if (modules == 0) return;
  for (size_t row = 0; row < groups.size(); ++row) {
    for (size_t column = 0; column <= row; ++column) {
      const int64_t warps = modules * groups[row].count * groups[column].count;
      launch(pairs, dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps)), kWarps * 32, 0,
             stream, modules, clients, rank, groups[row], groups[column], gram_b, gram_a, scale,
             products);
    }
  }
}

}  // namespace fedlora::cuda
