// The adapters' number types: widening (exact) and rounding to nearest even, once.
//
// Written on bits so that every instruction set rounds alike and the compiler can vectorise it; no
// 16-bit arithmetic is needed. A float64 goes to a 16-bit type through a float32 rounded to odd,
// which makes the second rounding the only one that counts (24 >= 2 + 11 bits).
//
// Included by kernels_body.h only, once per instruction set: hence the unnamed namespace.
#pragma once

#include <bit>
#include <cstdint>

namespace fedlora {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

inline double wide(double value) { return value; }
inline float wide(float value) { return value; }
inline float wide(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

// Shifting puts a binary16 number 112 powers of two too low, subnormals included; the product with
// 2^112 is exact. Infinities and NaNs get the exponent that the product cannot give them.
inline float wide(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000U) << 16;
  const uint32_t size = static_cast<uint32_t>(value.bits & 0x7FFFU) << 13;
  const uint32_t finite = as_bits(as_float(size) * 0x1p112F);
  const uint32_t special = size >= 0x0F800000U ? 0x7F800000U : 0U;
  return as_float(finite | special | sign);
}

// The float32 on the near side of zero whose last bit says that something was cut off.
inline float to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  const uint32_t bits = as_bits(nearest);
  const uint32_t beyond = __builtin_fabs(back) > __builtin_fabs(value) ? 1U : 0U;
  const uint32_t inexact = back < value || back > value ? 1U : 0U;
  return as_float((bits - beyond) | inexact);
}
inline float to_odd(float value) { return value; }

template <class S>
struct Narrow;

template <>
struct Narrow<double> {
  static double of(double value) { return value; }
};
template <>
struct Narrow<float> {
  static float of(double value) { return static_cast<float>(value); }
};
template <>
struct Narrow<BFloat16> {
  template <class T>
  static BFloat16 of(T value) {
    const uint32_t bits = as_bits(to_odd(value));
    const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40U;
    const bool is_nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
    return {static_cast<uint16_t>(is_nan ? nan : rounded)};
  }
};
template <>
struct Narrow<Float16> {
  template <class T>
  static Float16 of(T value) {
    const uint32_t bits = as_bits(to_odd(value));
    const uint32_t sign = (bits >> 16) & 0x8000U;
    const uint32_t size = bits & 0x7FFFFFFFU;
    // Normal: rebias and round. Subnormal: adding 0.5 leaves the rounded fraction in the low bits.
    const uint32_t normal = (size - 0x38000000U + 0xFFFU + ((size >> 13) & 1U)) >> 13;
    const uint32_t subnormal = as_bits(as_float(size) + 0.5F) - 0x3F000000U;
    const uint32_t finite = size < 0x38800000U ? subnormal : normal;
    const uint32_t special = size > 0x7F800000U ? 0x7E00U : 0x7C00U;
    return {static_cast<uint16_t>(sign | (size >= 0x47800000U ? special : finite))};
  }
};

template <class S, class T>
inline S narrow(T value) {
  return Narrow<S>::of(value);
}

}  // namespace
}  // namespace fedlora
