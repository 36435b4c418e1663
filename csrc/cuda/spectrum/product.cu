// Formula: product.h.
//
// Layout     a block computes a tile of 64 x 64 with 8 warps, 16 x 32 numbers each, from slices of
//            depth 16 in shared memory; threads read along whichever index is contiguous, the next
//            slice while this one is multiplied.
// Precision  float64 on tensor cores: one chain of fused multiply-adds per number.
// Shared     2 slices of 16 x 68 numbers, 17 KB (68: the lanes of a half-warp, four depths by four
//            rows, read from different banks).
#include "cuda/mma.cuh"
#include "product.h"

namespace fedlora::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kThreads = 256;
constexpr int kEach = kTile * kDepth / kThreads;  // numbers of a slice that a thread reads
constexpr int kWarpRows = 16;
constexpr int kWarpColumns = 32;
constexpr int kAcross = kTile / kWarpColumns;  // warps beside each other
constexpr int kTiles = kWarpColumns / 8;
constexpr int kRow = kTile + 4;
constexpr size_t kShared = 2 * kDepth * kRow * sizeof(double);

__device__ inline int extent(const int* kept, int64_t module, int whole) {
  return kept == nullptr ? whole : kept[module];
}

// One operand's slices: slice[t, i] = factor_t matrix(i, t) for a tile's rows from `first` on and
// depths from `start` on. `across` is the stride of i and `along` that of t.
class Slices {
 public:
  __device__ Slices(double* slice, const double* matrix, int across, int along, int first, int rows,
                    int depth, const double* factor)
      : slice_(slice),
        matrix_(matrix),
        across_(across),
        along_(along),
        first_(first),
        rows_(rows),
        depth_(depth),
        factor_(factor) {}

  __device__ void read(int start) {
#pragma unroll
    for (int each = 0; each < kEach; ++each) {
      const int i = first_ + row_of(each);
      const int t = start + depth_of(each);
      next_[each] = 0;
      if (i >= rows_ || t >= depth_) continue;
      next_[each] = matrix_[static_cast<int64_t>(i) * across_ + static_cast<int64_t>(t) * along_];
      if (factor_ != nullptr) next_[each] *= factor_[t];
    }
  }

  __device__ void store() const {
#pragma unroll
    for (int each = 0; each < kEach; ++each) {
      slice_[depth_of(each) * kRow + row_of(each)] = next_[each];
    }
  }

 private:
  __device__ static int place_of(int each) {
    return static_cast<int>(threadIdx.x) + each * kThreads;
  }
  __device__ int row_of(int each) const {
    return along_ == 1 ? place_of(each) / kDepth : place_of(each) % kTile;
  }
  __device__ int depth_of(int each) const {
    return along_ == 1 ? place_of(each) % kDepth : place_of(each) / kTile;
  }

  double* slice_;
  const double* matrix_;
  int across_;
  int along_;
  int first_;
  int rows_;
  int depth_;
  const double* factor_;
  double next_[kEach];
};

__global__ void __launch_bounds__(kThreads) product(Product p) {
  const int64_t module = blockIdx.x;
  if (p.solved != nullptr && p.solved[module] != 0) return;
  int rows = extent(p.kept_rows, module, p.rows);
  const int columns = extent(p.kept_columns, module, p.columns);
  const int depth = extent(p.kept_depth, module, p.depth);
  const int top = static_cast<int>(blockIdx.y) * kTile;
  const int left = static_cast<int>(blockIdx.z) * kTile;
  const double* a = p.a.data + module * p.a.module;
  const double* b = p.b.data + module * p.b.module;
  double* c = p.c.data + module * p.c.module;
  const int64_t offset = module * p.factor_stride;
  // Singular values descend: from the first zero on there is nothing to divide by.
  if (p.inverse_squares && top < rows && !(p.row_factor[offset + top] > 0)) rows = 0;
  double* slice_a = shared_memory<double>();
  double* slice_b = slice_a + kDepth * kRow;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = static_cast<int>(threadIdx.x) % 32 / 4;
  const int member = static_cast<int>(threadIdx.x) % 4;
  const int own_row = warp / kAcross * kWarpRows + group;
  const int own_column = warp % kAcross * kWarpColumns;

  double sums[kTiles][4] = {};
  if (top < rows && left < columns) {
    Slices of_a(slice_a, a, p.a.row, p.a.column, top, rows, depth, nullptr);
    Slices of_b(slice_b, b, p.b.column, p.b.row, left, columns, depth,
                p.depth_factor == nullptr ? nullptr : p.depth_factor + offset);
    of_a.read(0);
    of_b.read(0);
    for (int start = 0; start < depth; start += kDepth) {
      of_a.store();
      of_b.store();
      __syncthreads();
      if (start + kDepth < depth) {
        of_a.read(start + kDepth);
        of_b.read(start + kDepth);
      }
      double u[kDepth / 2];
#pragma unroll
      for (int i = 0; i < kDepth / 2; ++i) {
        u[i] = slice_a[(i / 2 * 4 + member) * kRow + own_row + i % 2 * 8];
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        double v[kDepth / 4];
#pragma unroll
        for (int i = 0; i < kDepth / 4; ++i) {
          v[i] = slice_b[(4 * i + member) * kRow + own_column + 8 * tile + group];
        }
        mma<kDepth>(sums[tile], u, v);
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = top + own_row + 8 * half;
    if (row >= p.rows) continue;
    double row_factor = p.row_factor == nullptr || row >= rows ? 1 : p.row_factor[offset + row];
    if (p.inverse_squares) row_factor = row_factor > 0 ? 1 / (row_factor * row_factor) : 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int column = left + own_column + 8 * tile + 2 * member + next;
        if (column >= p.columns) continue;
        const bool inside = row < rows && column < columns;
        double value = inside && row_factor != 0 ? sums[tile][2 * half + next] * row_factor : 0;
        if (inside && p.column_factor != nullptr) value *= p.column_factor[offset + column];
        c[static_cast<int64_t>(row) * p.c.row + static_cast<int64_t>(column) * p.c.column] = value;
      }
    }
  }
}

}  // namespace

void multiply(const Product& p, Stream stream) {
  if (p.modules == 0 || p.rows == 0 || p.columns == 0) return;
  const auto tiles = [](int extent) { return static_cast<unsigned>((extent + kTile - 1) / kTile); };
  launch(product, dim3(static_cast<unsigned>(p.modules), tiles(p.rows), tiles(p.columns)), kThreads,
         kShared, stream, p);
}

}  // namespace fedlora::cuda
