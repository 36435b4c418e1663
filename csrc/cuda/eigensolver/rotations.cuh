// One-sided Jacobi: rotates pairs of columns until all are orthogonal, so that G V = W S.
//
// A round rotates disjoint pairs, a group of kLanes threads each: both columns go to registers
// (kChunks numbers a thread each), three inner products by shuffles, one rotation, back. Traffic is
// 32 n bytes of shared memory a pair, 16 n^3 bytes a sweep, and that is what binds: at 128 bytes a
// clock 0.13 ms a sweep for n = 128, where the 7 n^3 flops take 0.06 ms of a multiprocessor.
#pragma once

#include "cuda/device.cuh"

namespace fedlora::cuda {

// Cosine under which two columns are orthogonal: the rounding of an inner product of 512 numbers is
// some sqrt(512) eps = 5e-15.
constexpr double kCosine = 1e-14;

// Columns of the shifted matrix whose squared norms are at or under kNoise shifts may belong to
// zero eigenvalues; their inner products count only above kQuiet (the matrix is scaled to
// between 1/2 and 4: n of them hide less than n eps).
constexpr double kNoise = 2;
constexpr double kQuiet = 1e-16;

template <int kLanes>
__device__ double group_sum(double value) {
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Rotates columns x and y against each other; false where they were orthogonal. All threads of the
// warp call it, those without a pair with active = false.
//
// Eight lanes read 64 bytes of a column at a time, so the two groups of half a warp must be in
// different halves of the banks: neighbouring columns are where ld is an odd multiple of 8; where
// it is an even one the odd groups swap chunks 2i and 2i + 1 (`stagger` = 1).
template <int kLanes, int kChunks>
__device__ bool rotate(double* x, double* y, int rows, int stagger, bool active, double shift) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  double u[kChunks], v[kChunks];
  double a = 0, b = 0, d = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int row = (i ^ stagger) * kLanes + lane;
    const bool inside = active && row < rows;
    u[i] = inside ? x[row] : 0;
    v[i] = inside ? y[row] : 0;
    a = fma(u[i], u[i], a);
    b = fma(v[i], v[i], b);
    d = fma(u[i], v[i], d);
  }
  a = group_sum<kLanes>(a);
  b = group_sum<kLanes>(b);
  d = group_sum<kLanes>(d);
  if (!(d * d > kCosine * kCosine * a * b)) return false;
  if (fmax(a, b) <= kNoise * shift && fabs(d) <= kQuiet) return false;
  const double zeta = (b - a) / (2 * d);
  const double tangent = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
  const double cosine = 1 / sqrt(1 + tangent * tangent);
  const double sine = cosine * tangent;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int row = (i ^ stagger) * kLanes + lane;
    if (row < rows) {
      x[row] = fma(cosine, u[i], -sine * v[i]);
      y[row] = fma(sine, u[i], cosine * v[i]);
    }
  }
  return true;
}

// The columns of one block: 2 * width of them, ld apart.
template <int kLanes, int kChunks>
class ColumnPairs {
 public:
  __device__ ColumnPairs(double* columns, int ld, int rows, int width, double shift)
      : columns_(columns), ld_(ld), rows_(rows), width_(width), shift_(shift) {}

  // Every pair of the 2 * width columns once: a round-robin tournament, column 2 width - 1 stays.
  __device__ bool all() const {
    const int players = 2 * width_ - 1;
    bool rotated = false;
    for (int round = 0; round < players; ++round) {
      rotated |= each_pair([&](int pair, int& x, int& y) {
        x = pair == 0 ? players : (round + pair) % players;
        y = pair == 0 ? round : (round - pair + players) % players;
      });
    }
    return rotated;
  }

  // Every column of the first half with every one of the second.
  __device__ bool across() const {
    bool rotated = false;
    for (int round = 0; round < width_; ++round) {
      rotated |= each_pair([&](int pair, int& x, int& y) {
        x = pair;
        y = width_ + (pair + round) % width_;
      });
    }
    return rotated;
  }

 private:
  // One round of `width` disjoint pairs, and the barrier behind it.
  template <class Pair>
  __device__ bool each_pair(const Pair& columns_of) const {
    constexpr int kGroups = 32 / kLanes;  // of a warp
    const int group = static_cast<int>(threadIdx.x) / kLanes;
    const int groups = static_cast<int>(blockDim.x) / kLanes;
    const int stagger = kLanes == 8 && ld_ % 16 == 0 ? group % 2 : 0;
    bool rotated = false;
#pragma unroll 1
    for (int base = 0; base < width_; base += groups) {
      if (base + group / kGroups * kGroups >= width_) break;  // a warp without pairs
      const int pair = base + group;
      int x = 0, y = 0;
      if (pair < width_) columns_of(pair, x, y);
      rotated |= rotate<kLanes, kChunks>(columns_ + x * ld_, columns_ + y * ld_, rows_, stagger,
                                         pair < width_, shift_);
    }
    __syncthreads();
    return rotated;
  }

  double* columns_;
  int ld_;
  int rows_;
  int width_;
  double shift_;
};

}  // namespace fedlora::cuda
