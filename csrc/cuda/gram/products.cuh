// Products of two fragments (factors.cuh) on tensor cores: 32 x 32 numbers of G a warp, exact in
// float64 or fast in float32. Thread sums c[i][j] are the m16n8 tiles of mma.cuh, 2 by 4 of them;
// those with kFirst <= j < kLast are added to, c[i][3] only where `whole`.
#pragma once

#include "cuda/factors.cuh"

namespace fedlora::cuda {

// c += a b for the 4 E depths of a step, in float64.
template <int kFirst, int kLast, class S>
__device__ __forceinline__ void multiply_exact(const S (&left)[4][kUnit<S>],
                                               const S (&right)[4][kUnit<S>], bool whole,
                                               double (&c)[2][4][4]) {
  constexpr int kSlices = kUnit<S> < 4 ? kUnit<S> : 4;
#pragma unroll
  for (int first = 0; first < kUnit<S>; first += kSlices) {
    double a[2][2 * kSlices];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        a[i][2 * s] = widen<double>(left[2 * i][first + s]);
        a[i][2 * s + 1] = widen<double>(left[2 * i + 1][first + s]);
      }
    }
#pragma unroll
    for (int j = kFirst; j < kLast; ++j) {
      if (j == 3 && !whole) break;
      double b[kSlices];
#pragma unroll
      for (int s = 0; s < kSlices; ++s) b[s] = widen<double>(right[j][first + s]);
#pragma unroll
      for (int i = 0; i < 2; ++i) mma<4 * kSlices>(c[i][j], a[i], b);
    }
  }
}

// The same in float32, for bf16 and fp16 as they are.
template <int kFirst, int kLast, class S>
__device__ __forceinline__ void multiply_fast(const S (&left)[4][8], const S (&right)[4][8],
                                              bool whole, float (&c)[2][4][4]) {
#pragma unroll
  for (int first = 0; first < 8; first += 4) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const S(&line)[8] = left[2 * i + r % 2];
        a[i][r] = packed(line[first + r / 2 * 2], line[first + r / 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int j = kFirst; j < kLast; ++j) {
      if (j == 3 && !whole) break;
      const uint32_t b[2] = {packed(right[j][first], right[j][first + 1]),
                             packed(right[j][first + 2], right[j][first + 3])};
#pragma unroll
      for (int i = 0; i < 2; ++i) mma_half<S>(c[i][j], a[i], b);
    }
  }
}

__device__ __forceinline__ float from_tf32(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both;
  both.bits = bits;
  return both.value;
}

// And for fp32, x = large + small with 11 bits each. The two mixed products have sums of their own:
// added to the large one in turn they would make G_ij and G_ji round differently, and what clients
// share would not cancel.
template <int kFirst, int kLast>
__device__ __forceinline__ void multiply_fast(const float (&left)[4][4], const float (&right)[4][4],
                                              bool whole, float (&c)[2][4][4],
                                              float (&mixed)[2][4][4]) {
#pragma unroll
  for (int first = 0; first < 4; first += 2) {
    uint32_t large[2][4];
    uint32_t small[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float value = left[2 * i + r % 2][first + r / 2];
        large[i][r] = to_tf32(value);
        small[i][r] = to_tf32(value - from_tf32(large[i][r]));
      }
    }
#pragma unroll
    for (int j = kFirst; j < kLast; ++j) {
      if (j == 3 && !whole) break;
      uint32_t b_large[2];
      uint32_t b_small[2];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float value = right[j][first + s];
        b_large[s] = to_tf32(value);
        b_small[s] = to_tf32(value - from_tf32(b_large[s]));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_tf32(c[i][j], large[i], b_large);
        mma_tf32(mixed[i][j], small[i], b_large);
        mma_tf32(mixed[i][j], large[i], b_small);
      }
    }
  }
}

// The products of a step: exact ones go to `sum`, fast ones to the float32 sums of a stage.
template <int kFirst, int kLast, bool kFast, class S>
__device__ __forceinline__ void multiply(const S (&left)[4][kUnit<S>],
                                         const S (&right)[4][kUnit<S>], bool whole,
                                         double (&sum)[2][4][4], float (&part)[2][4][4],
                                         float (&mixed)[2][4][4]) {
  if constexpr (kFast && sizeof(S) == 2) {
    multiply_fast<kFirst, kLast>(left, right, whole, part);
  } else if constexpr (kFast) {
    multiply_fast<kFirst, kLast>(left, right, whole, part, mixed);
  } else {
    multiply_exact<kFirst, kLast, S>(left, right, whole, sum);
  }
}

// Adds up float32 sums in float64 and begins new ones.
__device__ __forceinline__ void promote(float (&part)[2][4][4], double (&sum)[2][4][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sum[i][j][e] += static_cast<double>(part[i][j][e]);
        part[i][j][e] = 0;
      }
    }
  }
}

}  // namespace fedlora::cuda
