#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/kernels.h"

namespace fedlora {
namespace {

double value_of(DType dtype, uint16_t bits) {
  double wide = 0;
  kernels().widen(dtype, &bits, 1, &wide);
  return wide;
}

uint16_t bits_of(DType dtype, double value) {
  uint16_t bits = 0;
  kernels().narrow(dtype, &value, 1, &bits);
  return bits;
}

}  // namespace

TEST_CASE("every 16-bit number survives widening and narrowing") {
  for (const DType dtype : {DType::bf16, DType::fp16}) {
    for (uint32_t bits = 0; bits < 0x10000U; ++bits) {
      const double value = value_of(dtype, static_cast<uint16_t>(bits));
      if (std::isnan(value)) {
        CHECK(std::isnan(value_of(dtype, bits_of(dtype, value))));
      } else {
        REQUIRE(bits_of(dtype, value) == bits);
      }
    }
  }
}

TEST_CASE("numbers between two neighbours go to the nearer one, ties to the even one") {
  for (const DType dtype : {DType::bf16, DType::fp16}) {
    const uint16_t end = dtype == DType::bf16 ? 0x7F7F : 0x7BFF;
    for (uint16_t bits = 0; bits < end; ++bits) {
      const double low = value_of(dtype, bits);
      const double high = value_of(dtype, static_cast<uint16_t>(bits + 1));
      const double middle = low + (high - low) / 2;
      // A float64 next to the tie: rounding to float32 first would make it the tie.
      REQUIRE(bits_of(dtype, std::nextafter(middle, low)) == bits);
      REQUIRE(bits_of(dtype, std::nextafter(middle, high)) == bits + 1);
      REQUIRE(bits_of(dtype, middle) == bits + (bits & 1));
      REQUIRE(bits_of(dtype, -middle) == (0x8000 | (bits + (bits & 1))));
    }
  }
}

TEST_CASE("what is too large becomes infinite, NaN stays NaN") {
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(value_of(DType::fp16, bits_of(DType::fp16, 65519.0)) == 65504);
  CHECK(value_of(DType::fp16, bits_of(DType::fp16, 65520.0)) == infinity);
  CHECK(value_of(DType::fp16, bits_of(DType::fp16, -1e300)) == -infinity);
  CHECK(value_of(DType::bf16, bits_of(DType::bf16, 1e300)) == infinity);
  CHECK(std::isnan(value_of(DType::bf16, bits_of(DType::bf16, std::nan("")))));
  CHECK(std::isnan(value_of(DType::fp16, bits_of(DType::fp16, std::nan("")))));
}

}  // namespace fedlora
