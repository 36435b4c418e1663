#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/leading.h"
#include "matrices.h"

namespace fedlora::tests {
namespace {

// Q diag(values) Q^T with Q from Householder reflections.
Matrix with_spectrum(const Matrix& values, uint64_t seed) {
  const auto n = static_cast<int64_t>(values.size());
  Matrix q(values.size() * values.size(), 0.0);
  for (int64_t i = 0; i < n; ++i) q[i * n + i] = 1;
  for (uint64_t step = 0; step < 3; ++step) {
    const Matrix v = random(1, n, seed + step);
    double square = 0;
    for (const double value : v) square += value * value;
    const Matrix projected = product(q, v, n, n, 1);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) q[i * n + j] -= 2 * projected[i] * v[j] / square;
    }
  }
  Matrix scaled = q;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) scaled[i * n + j] *= values[j];
  }
  return product(scaled, transposed(q, n, n), n, n, n);
}

void check(const Matrix& values, double energy, int64_t cap, int64_t expected) {
  CAPTURE(values.size());
  CAPTURE(cap);
  const auto n = static_cast<int64_t>(values.size());
  const Matrix m = with_spectrum(values, 7);
  double trace = 0;
  for (const double value : values) trace += value;
  Matrix work = m;
  const Eigenpairs found = leading_eigenpairs(n, work.data(), energy * trace, cap);
  REQUIRE(found.converged);
  REQUIRE(found.count >= expected);
  for (int64_t c = 0; c < expected; ++c) {
    CHECK(std::abs(found.values[c] - values[c]) <= 1e-13 * n * values[0]);
    const Matrix vector(found.vectors.get() + c * n, found.vectors.get() + (c + 1) * n);
    const Matrix image = product(m, vector, n, n, 1);
    double residual = 0;
    for (int64_t i = 0; i < n; ++i) {
      residual = std::max(residual, std::abs(image[i] - found.values[c] * vector[i]));
    }
    CHECK(residual <= 2e-9 * values[0]);
    for (int64_t other = 0; other <= c; ++other) {
      double inner = 0;
      for (int64_t i = 0; i < n; ++i) inner += vector[i] * found.vectors[other * n + i];
      CHECK(std::abs(inner - (other == c ? 1 : 0)) <= 1e-13);
    }
  }
}

}  // namespace

TEST_CASE("the leading pairs, whatever follows them") {
  Matrix few(200, 1e-5);
  std::fill_n(few.begin(), 15, 1.0);
  check(few, 0.9, 200, 14);

  Matrix decaying(256);
  for (size_t i = 0; i < decaying.size(); ++i) decaying[i] = std::pow(0.8, static_cast<double>(i));
  check(decaying, 0.9, 256, 11);
  check(decaying, 1.0, 5, 5);

  // More equal values than a block of the Krylov space is wide.
  Matrix plateau(256, 1e-6);
  std::fill_n(plateau.begin(), 40, 2.0);
  check(plateau, 0.5, 256, 20);

  Matrix flat(150, 1.0);
  check(flat, 0.9, 150, 135);
  check(flat, 1.0, 10, 10);

  Matrix small(20);
  for (size_t i = 0; i < small.size(); ++i) small[i] = 20 - static_cast<double>(i);
  check(small, 1.0, 20, 20);
}

TEST_CASE("every size around the registers and tiles, few pairs, half and all of them") {
  for (int64_t n = 1; n <= 70; n += n < 20 ? 1 : 7) {
    for (const double ratio : {0.5, 0.9, 1.0}) {
      Matrix values(static_cast<size_t>(n));
      for (int64_t i = 0; i < n; ++i) values[i] = std::pow(ratio, static_cast<double>(i));
      for (const int64_t cap : {int64_t{1}, n / 4 + 1, n / 2 + 1, n}) {
        check(values, 1.0, cap, std::min(cap, ratio == 0.5 ? int64_t{30} : n));
      }
    }
  }
}

TEST_CASE("matrices whose squares overflow or vanish") {
  for (const double size : {1e-200, 1e200}) {
    Matrix values(40);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = size * std::pow(0.7, static_cast<double>(i));
    check(values, 1.0, 5, 5);
    check(values, 1.0, 30, 30);
  }
}

TEST_CASE("nothing, zeros and NaN") {
  CHECK(leading_eigenpairs(0, nullptr, 0, 1).converged);
  Matrix zeros(100 * 100, 0.0);
  const Eigenpairs none = leading_eigenpairs(100, zeros.data(), 0, 100);
  CHECK(none.converged);
  CHECK(none.values[0] == 0);
  Matrix invalid(100 * 100, std::numeric_limits<double>::quiet_NaN());
  CHECK_FALSE(leading_eigenpairs(100, invalid.data(), 0, 100).converged);
}

}  // namespace fedlora::tests
