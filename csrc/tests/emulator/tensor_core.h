// Float32 sums as tensor cores make them, which is not as IEEE arithmetic would.
//
// Products are exact. A block of them and the sum so far are cut off, not rounded, `kept` binary
// places under the largest of their exponents, added exactly, and cut off again to float32:
//
//   sm_80         16 bytes of operands (8 of 16 bits, 4 of tf32), 24 places
//   sm_90, later  32 bytes of operands (16 of 16 bits, 8 of tf32), 25 places
//
// as measured by Fasi et al. (PeerJ Computer Science 7:e330, 2021) and Xie et al. (arXiv
// 2511.10909, 2025). Float64 products need no such model: they are chains of fused multiply-adds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace fedlora::emulator {

// Exponent of a float32; for a product of two the sum of theirs, unlike that of its value.
inline int exponent_of(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<int>(bits >> 23U & 0xFFU) - 127;
}

inline float cut_off(double value) {
  const auto nearest = static_cast<float>(value);
  return std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.0F) : nearest;
}

// c + sum of a_k b_k over one block.
inline float tensor_core_block(float c, const float* a, const float* b, int count, int kept) {
  int largest = exponent_of(c);
  double plain = c;
  for (int k = 0; k < count; ++k) {
    plain += static_cast<double>(a[k]) * b[k];
    if (a[k] != 0 && b[k] != 0) largest = std::max(largest, exponent_of(a[k]) + exponent_of(b[k]));
  }
  if (!std::isfinite(plain)) return static_cast<float>(plain);
  const double scale = std::ldexp(1.0, kept - largest);
  auto sum = static_cast<int64_t>(c * scale);
  for (int k = 0; k < count; ++k) {
    sum += static_cast<int64_t>(static_cast<double>(a[k]) * b[k] * scale);
  }
  return cut_off(static_cast<double>(sum) / scale);
}

// The same over an instruction's `count` terms of `bytes` each.
inline float tensor_core_sum(float c, const float* a, const float* b, int count, int bytes,
                             int capability) {
  const int block = std::min(count, (capability < 90 ? 16 : 32) / bytes);
  const int kept = capability < 90 ? 24 : 25;
  for (int k = 0; k < count; k += block) c = tensor_core_block(c, a + k, b + k, block, kept);
  return c;
}

}  // namespace fedlora::emulator
