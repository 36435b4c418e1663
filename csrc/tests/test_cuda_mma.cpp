// Tensor-core products in the emulator: where operands lie, and how float32 sums are cut off.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/mma.cuh"

namespace fedlora::tests {
namespace {

using namespace fedlora::cuda;

template <int kDepth>
__global__ void multiply_double(const double* a, const double* b, double* c) {
  const int g = static_cast<int>(threadIdx.x) / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  double fa[kDepth / 2];
  double fb[kDepth / 4];
  double fc[4];
  for (int s = 0; s < kDepth / 4; ++s) {
    for (int h = 0; h < 2; ++h) fa[2 * s + h] = a[(g + 8 * h) * kDepth + 4 * s + t];
    fb[s] = b[(4 * s + t) * 8 + g];
  }
  for (int i = 0; i < 4; ++i) fc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma<kDepth>(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

__global__ void multiply_tf32(const float* a, const float* b, float* c) {
  const int g = static_cast<int>(threadIdx.x) / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  uint32_t fa[4];
  uint32_t fb[2];
  float fc[4] = {};
  for (int s = 0; s < 2; ++s) {
    for (int h = 0; h < 2; ++h) fa[2 * s + h] = to_tf32(a[(g + 8 * h) * 8 + 4 * s + t]);
    fb[s] = to_tf32(b[(4 * s + t) * 8 + g]);
  }
  mma_tf32(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

template <class S>
__global__ void multiply_half(const S* a, const S* b, float* c) {
  const int g = static_cast<int>(threadIdx.x) / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  uint32_t fa[4];
  uint32_t fb[2];
  float fc[4] = {};
  const auto pair = [](S low, S high) {
    uint16_t bits[2];
    std::memcpy(bits, &low, 2);
    std::memcpy(bits + 1, &high, 2);
    return static_cast<uint32_t>(bits[0]) | static_cast<uint32_t>(bits[1]) << 16;
  };
  for (int s = 0; s < 2; ++s) {
    const int k = 8 * s + 2 * t;
    for (int h = 0; h < 2; ++h) {
      fa[2 * s + h] = pair(a[(g + 8 * h) * 16 + k], a[(g + 8 * h) * 16 + k + 1]);
    }
    fb[s] = pair(b[k * 8 + g], b[(k + 1) * 8 + g]);
  }
  mma_half<S>(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

// Small integers: every format and every order of the sum is exact.
double small(int i) { return (i * 37 + 11) % 17 - 8; }

template <class S, class T>
void check_mma(int depth, void (*kernel)(const S*, const S*, T*), bool accumulates) {
  std::vector<S> a, b;
  std::vector<T> c(16 * 8);
  for (int i = 0; i < 16 * depth; ++i) a.push_back(cuda::narrow<S>(small(i)));
  for (int i = 0; i < depth * 8; ++i) b.push_back(cuda::narrow<S>(small(3 * i + 1)));
  std::vector<T> expected(c.size());
  for (int i = 0; i < 16 * 8; ++i) {
    if (accumulates) c[i] = expected[i] = i;
    for (int k = 0; k < depth; ++k) {
      expected[i] += static_cast<T>(small(i / 8 * depth + k) * small(3 * (k * 8 + i % 8) + 1));
    }
  }
  launch(kernel, 1, 32, 0, Stream{}, a.data(), b.data(), c.data());
  CHECK(c == expected);
}

TEST_CASE("tensor-core products") {
  check_mma<double, double>(4, multiply_double<4>, true);
  check_mma<double, double>(8, multiply_double<8>, true);
  check_mma<double, double>(16, multiply_double<16>, true);
  check_mma<float, float>(8, multiply_tf32, false);
  check_mma<bf16, float>(16, multiply_half<bf16>, false);
  check_mma<fp16, float>(16, multiply_half<fp16>, false);
}

TEST_CASE("tf32 keeps eleven bits, to nearest") {
  const auto back = [](float value) { return as_float(to_tf32(value)); };
  CHECK(back(1 + 0x1p-10F) == 1 + 0x1p-10F);
  CHECK(back(1 + 0x1p-12F) == 1);
  CHECK(back(1 + 0x1p-11F) == 1 + 0x1p-10F);
  CHECK(back(-1 - 0x1.8p-11F) == -1 - 0x1p-10F);
  CHECK(std::isinf(back(INFINITY)));
}

// c + a b, `count` times; the instruction's other terms are zero.
float summed(int capability, float c, float a, float b, int count) {
  std::vector<float> left(16);
  const std::vector<float> right(16, b);
  std::fill_n(left.begin(), count, a);
  return emulator::tensor_core_sum(c, left.data(), right.data(), 16, 2, capability);
}

TEST_CASE("float32 sums are cut off, 24 places under the largest on sm_80, 25 from sm_90 on") {
  // 16 times 2^-25 beside 1: nothing of it on sm_80, all of it on sm_90.
  CHECK(summed(80, 1, 0x1p-12F, 0x1p-13F, 16) == 1);
  CHECK(summed(90, 1, 0x1p-12F, 0x1p-13F, 16) == 1 + 0x1p-21F);
  // The sum itself is cut off as well, toward zero.
  CHECK(summed(90, 1, 0x1.8p-12F, 0x1p-11F, 1) == 1 + 0x1p-23F);
  CHECK(summed(90, -1, -0x1.8p-12F, 0x1p-11F, 1) == -1 - 0x1p-23F);
  // A product's exponent is the sum of its factors'.
  CHECK(summed(90, 0x1p-24F, 0x1.8p0F, 0x1.8p0F, 1) == 2.25F);
  // A block is one sum: sm_80 takes 8 terms of 16 bits at a time, sm_90 all 16.
  const float left[16] = {0x1p30F, 0, 0, 0, 0, 0, 0, 0, -0x1p30F};
  const std::vector<float> ones(16, 1.0F);
  CHECK(emulator::tensor_core_sum(64, left, ones.data(), 16, 2, 90) == 64);
  CHECK(emulator::tensor_core_sum(64, left, ones.data(), 16, 2, 80) == 0);
  CHECK(std::isinf(summed(90, INFINITY, 1, 1, 16)));
  CHECK(std::isnan(summed(90, 1, NAN, 1, 16)));
}

}  // namespace
}  // namespace fedlora::tests
