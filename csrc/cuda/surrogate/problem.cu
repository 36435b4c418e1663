// packed   P[(u, v), (i, j)] = s_u s_v (G^{uv}_ij + G^{uv}_ji) / sqrt(2), G^{uv}_ii on the diagonal
// cross    M_uv = s_u sum_k w_k s_k <G_B^{ku}, G_A^{kv}>, a product of [K, R r] by [R r, K]
//
// Layout     Grams row-major. pack: one block per module and client u. cross: one block per module
//            and tile of 16 x 16 clients, a thread per number, the inner index in slices of 32.
// Precision  float64.
// Shared     cross: two slices of 32 x 17 numbers, 9 KB.
#include "problem.h"

namespace fedlora::cuda {
namespace {

constexpr int kPackThreads = 256;
constexpr int kTile = 16;
constexpr int kSlice = 32;
constexpr int kRow = kTile + 1;
constexpr double kHalfRoot = 0.70710678118654752440;

__global__ void __launch_bounds__(kPackThreads) pack(SurrogateProblem problem) {
  const int64_t module = blockIdx.x;
  const int u = static_cast<int>(blockIdx.y);
  const int clients = problem.clients;
  const int rank = problem.rank;
  const int64_t width = static_cast<int64_t>(clients) * rank;
  const int64_t size = static_cast<int64_t>(problem.pairs()) * problem.entries();
  const int block = rank * rank;
  const double* scale = problem.scale + module * clients;
  const int64_t corner = module * width * width + u * rank * width;
  for (int place = static_cast<int>(threadIdx.x); place < (clients - u) * block;
       place += kPackThreads) {
    const int v = u + place / block;
    const int i = place % block / rank;
    const int j = place % rank;
    if (j < i) continue;
    const int64_t here = corner + i * width + v * rank + j;
    const int64_t mirrored = corner + j * width + v * rank + i;
    const double share = i == j ? 0.5 : kHalfRoot;
    const int64_t to = module * size +
                       static_cast<int64_t>(packed(clients, u, v)) * problem.entries() +
                       packed(rank, i, j);
    const double both = problem.gram_b[here] + problem.gram_b[mirrored];
    problem.packed_b[to] = share * scale[u] * scale[v] * both;
    problem.packed_a[to] = share * (problem.gram_a[here] + problem.gram_a[mirrored]);
  }
}

__global__ void __launch_bounds__(kTile* kTile) cross(SurrogateProblem problem) {
  const int64_t module = blockIdx.x;
  const int clients = problem.clients;
  const int rank = problem.rank;
  const int width = clients * rank;
  const int top = static_cast<int>(blockIdx.y) * kTile;
  const int left = static_cast<int>(blockIdx.z) * kTile;
  const double* gram_b = problem.gram_b + module * width * width;
  const double* gram_a = problem.gram_a + module * width * width;
  const double* scale = problem.scale + module * clients;
  double* slice_b = shared_memory<double>();
  double* slice_a = slice_b + kSlice * kRow;
  const int thread = static_cast<int>(threadIdx.x);
  const int u = thread / kTile;
  const int v = thread % kTile;
  const int64_t depth = static_cast<int64_t>(width) * rank;
  double sum = 0;
  for (int64_t start = 0; start < depth; start += kSlice) {
    for (int place = thread; place < kSlice * kTile; place += kTile * kTile) {
      const int client = place / kSlice;
      const int64_t t = start + place % kSlice;
      const int row = static_cast<int>(t / rank);
      const int64_t at = static_cast<int64_t>(row) * width + t % rank;
      const bool inside = t < depth;
      const int owner = inside ? row / rank : 0;
      const double weight = problem.weights[owner] * scale[owner];
      const int to = place % kSlice * kRow + client;
      const bool in_b = inside && top + client < clients;
      const bool in_a = inside && left + client < clients;
      slice_b[to] = in_b ? weight * gram_b[at + (top + client) * rank] : 0;
      slice_a[to] = in_a ? gram_a[at + (left + client) * rank] : 0;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kSlice; ++t) {
      sum = fma(slice_b[t * kRow + u], slice_a[t * kRow + v], sum);
    }
    __syncthreads();
  }
  if (top + u < clients && left + v < clients) {
    problem.cross[(module * clients + top + u) * clients + left + v] = sum * scale[top + u];
  }
}

}  // namespace

void prepare_surrogate(const SurrogateProblem& problem, Stream stream) {
  const auto modules = static_cast<unsigned>(problem.modules);
  const auto clients = static_cast<unsigned>(problem.clients);
  launch(pack, dim3(modules, clients), kPackThreads, 0, stream, problem);
  const unsigned tiles = (clients + kTile - 1) / kTile;
  launch(cross, dim3(modules, tiles, tiles), kTile * kTile, 2 * kSlice * kRow * sizeof(double),
         stream, problem);
}

}  // namespace fedlora::cuda
