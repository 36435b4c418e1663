// Tensor-core products as functions of a warp: c [16, 8] += a [16, K] b [K, 8].
//
// Lane 4 g + t (g < 8, t < 4) holds, as PTX lays them out for m16n8k*:
//   float64         a[2 s + h] = A[g + 8 h, 4 s + t]    b[s] = B[4 s + t, g]         K = 4, 8, 16
//   tf32 k8         a[2 s + h] = A[g + 8 h, 4 s + t]    b[s] = B[4 s + t, g]
//   bf16, fp16 k16  a[2 s + h] = A[g + 8 h, 8 s + 2 t + {0, 1}]    b[s] = B[8 s + 2 t + {0, 1}, g]
//   all             c[2 h + e] = C[g + 8 h, 2 t + e]
// The sum over K does not care how K is numbered, so kernels give a lane those terms that lie
// together in memory.
//
// float64 m16n8k* begins with sm_90; sm_80 does the same with m8n8k4, of which it is made: a chain
// of fused multiply-adds in the order of k, there as in the emulator. Float32 sums are cut off
// instead of rounded (tests/emulator/tensor_core.h).
#pragma once

#include "device.cuh"

#ifndef __CUDACC__
#include "tests/emulator/tensor_core.h"
#endif

namespace fedlora::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ void mma_m8n8k4(double& c0, double& c1, double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c0), "+d"(c1)
               : "d"(a), "d"(b));
}

template <int kDepth>
__device__ __forceinline__ void mma(double (&c)[4], const double (&a)[kDepth / 2],
                                    const double (&b)[kDepth / 4]) {
  static_assert(kDepth == 4 || kDepth == 8 || kDepth == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#pragma unroll
  for (int s = 0; s < kDepth / 4; ++s) {
    mma_m8n8k4(c[0], c[1], a[2 * s], b[s]);
    mma_m8n8k4(c[2], c[3], a[2 * s + 1], b[s]);
  }
#else
  if constexpr (kDepth == 4) {
    asm volatile(
        "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(b[0]));
  } else if constexpr (kDepth == 8) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, "
        "%8, %9, %10, %11}, {%12, %13, %14, %15}, {%0, %1, %2, %3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]),
          "d"(b[0]), "d"(b[1]), "d"(b[2]), "d"(b[3]));
  }
#endif
}

// A float32 as the tensor cores read it: 11 significant bits, rounded to nearest.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// S: bf16 or fp16, two to a register, the lower term in the lower half.
template <class S>
__device__ __forceinline__ void mma_half(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<S, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#else

// What one lane brings to a product of T, its operands in registers of type E.
template <class T, class E>
struct Fragments {
  T* c;
  const E* a;
  const E* b;
};

// value(E, i) is element i of a register; a register holds kEach terms of K.
template <int kDepth, int kEach, class T, class E, class F>
void multiply(void* const* arguments, const F& value) {
  const auto* lanes = reinterpret_cast<Fragments<T, E>* const*>(arguments);
  constexpr int kStep = 4 * kEach;  // terms per slice
  T a[16][kDepth];
  T b[kDepth][8];
  emulator::fused += 16 * 8 * kDepth;
  emulator::on_scheduler[threadIdx.x / emulator::kWarp % 4] += 16 * 8 * kDepth;
  for (int lane = 0; lane < emulator::kWarp; ++lane) {
    const int g = lane / 4;
    const int t = lane % 4;
    for (int s = 0; s < kDepth / kStep; ++s) {
      for (int i = 0; i < kEach; ++i) {
        const int k = kStep * s + kEach * t + i;
        a[g][k] = value(lanes[lane]->a[2 * s], i);
        a[g + 8][k] = value(lanes[lane]->a[2 * s + 1], i);
        b[k][g] = value(lanes[lane]->b[s], i);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    const auto result = [&](int column) -> T& {
      return lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2];
    };
    if constexpr (std::is_same_v<T, float>) {
      for (int column = 0; column < 8; ++column) {
        float terms[kDepth];
        for (int k = 0; k < kDepth; ++k) terms[k] = b[k][column];
        result(column) = emulator::tensor_core_sum(result(column), a[row], terms, kDepth, 4 / kEach,
                                                   device().capability);
      }
    } else {
      T sum[8];
      for (int column = 0; column < 8; ++column) sum[column] = result(column);
      for (int k = 0; k < kDepth; ++k) {
        for (int column = 0; column < 8; ++column) {
          sum[column] = std::fma(a[row][k], b[k][column], sum[column]);
        }
      }
      for (int column = 0; column < 8; ++column) result(column) = sum[column];
    }
  }
}

template <int kDepth>
void mma(double (&c)[4], const double (&a)[kDepth / 2], const double (&b)[kDepth / 4],
         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(kDepth == 4 || kDepth == 8 || kDepth == 16);
  Fragments<double, double> own = {c, a, b};
  emulator::meet_warp({"mma", file, line}, &own, [](void* const* arguments) {
    multiply<kDepth, 1, double, double>(arguments, [](double value, int) { return value; });
  });
}

inline uint32_t to_tf32(float value) {
  uint32_t bits = as_bits(value);
  if ((bits & 0x7F800000U) != 0x7F800000U) bits += 0x1000U;  // ties go away from zero
  return bits & 0xFFFFE000U;
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Fragments<float, uint32_t> own = {c, a, b};
  emulator::meet_warp({"mma_tf32", file, line}, &own, [](void* const* arguments) {
    multiply<8, 1, float, uint32_t>(
        arguments, [](uint32_t bits, int) { return as_float(bits & 0xFFFFE000U); });
  });
}

template <class S>
void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Fragments<float, uint32_t> own = {c, a, b};
  emulator::meet_warp({"mma_half", file, line}, &own, [](void* const* arguments) {
    multiply<16, 2, float, uint32_t>(arguments, [](uint32_t bits, int i) {
      return widen<float>(S{static_cast<uint16_t>(i == 0 ? bits : bits >> 16)});
    });
  });
}

#endif

}  // namespace fedlora::cuda
