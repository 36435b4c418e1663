#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/lapack.h"
#include "core/rank.h"
#include "core/stacked_svd.h"
#include "matrices.h"

namespace fedlora::tests {
namespace {

struct Problem {
  int64_t m, n, rank;
  Matrix b, a, scale;
};

Problem family(const std::string& kind, int64_t m, int64_t n, int64_t clients, int64_t r) {
  Problem problem = {m,
                     n,
                     clients * r,
                     random(m, clients * r, 1),
                     random(clients * r, n, 2),
                     Matrix(static_cast<size_t>(clients * r), 2.0 / static_cast<double>(clients))};
  for (int64_t k = 0; k < problem.rank; ++k) {
    for (int64_t j = 0; j < n; ++j) {
      double& value = problem.a[k * n + j];
      const double first = problem.a[k % r * n + j];
      if (kind == "shared start" && k >= r) value = first + 1e-3 * value;
      if (kind == "duplicates" && k >= r) value = first;
      if (kind == "zero") value = 0;
      if (kind == "one large A" && k < r) value *= 1e6;
    }
    for (int64_t i = 0; i < m; ++i) {
      double& value = problem.b[i * problem.rank + k];
      if (kind == "one large A" && k < r) value *= 1e-6;
      if (kind == "canceling" && k >= r) value = (k / r % 2 == 0 ? 1 : -1) * value;
    }
    if (kind == "no client" && k < r) problem.scale[k] = 0;
  }
  return problem;
}

double frobenius(const Matrix& matrix) {
  double square = 0;
  for (const double value : matrix) square += value * value;
  return std::sqrt(square);
}

void check(const std::string& kind, int64_t m, int64_t n, int64_t clients, int64_t r, DType dtype,
           bool fast) {
  CAPTURE(kind);
  CAPTURE(m);
  CAPTURE(n);
  CAPTURE(clients);
  CAPTURE(fast);
  Problem problem = family(kind, m, n, clients, r);
  problem.b = rounded(problem.b, dtype);
  problem.a = rounded(problem.a, dtype);
  const int64_t rank = problem.rank;
  const int64_t width = std::min({rank, m, n});
  const std::vector<int64_t> ranks(static_cast<size_t>(clients), r);
  const Side b(problem.b, false, ranks, m, dtype);
  const Side a(problem.a, true, ranks, n, dtype);
  Matrix scaled = problem.b;
  for (int64_t i = 0; i < m * rank; ++i) scaled[i] *= problem.scale[i % rank];
  const Matrix update = product(scaled, problem.a, m, rank, n);
  Matrix work = update, u(static_cast<size_t>(n * std::min(m, n))),
         vt(static_cast<size_t>(m * std::min(m, n))), values(static_cast<size_t>(std::min(m, n)));
  REQUIRE(lapack::svd(n, m, work.data(), values.data(), u.data(), vt.data()));

  std::vector<char> b_g(static_cast<size_t>(m * width * bytes_of(dtype)));
  std::vector<char> a_g(static_cast<size_t>(n * width * bytes_of(dtype)));
  Matrix sigma(static_cast<size_t>(rank));
  int64_t p = 0;
  stacked_svd(b.factors(), a.factors(), problem.scale.data(), {0.9, width, fast}, 2,
              {b_g.data(), a_g.data(), sigma.data(), &p});
  double total = 0;
  double rest = 0;
  for (const double value : values) total += value * value;
  for (size_t i = static_cast<size_t>(p); i < values.size(); ++i) rest += values[i] * values[i];
  CHECK(rest <= (0.1 + 1e-9) * total);
  if (p > 0) CHECK(rest + values[p - 1] * values[p - 1] >= (0.1 - 1e-9) * total);
  Matrix error = product(widened(b_g, dtype), widened(a_g, dtype), m, width, n);
  for (size_t i = 0; i < error.size(); ++i) error[i] -= update[i];
  CHECK(frobenius(error) <= std::sqrt(rest) + 1e-6 * std::sqrt(total));
  for (int64_t i = 0; i < p; ++i) {
    CHECK(std::abs(sigma[i] - values[i]) <= (fast ? 1e-6 : 1e-10) * values[0]);
  }
}

}  // namespace

TEST_CASE("truncated SVDs of every family, on every route") {
  for (const char* kind : {"independent", "shared start", "duplicates", "zero", "one large A",
                           "canceling", "no client"}) {
    for (const bool fast : {false, true}) {
      for (const DType dtype : {DType::fp32, DType::fp64}) {
        check(kind, 90, 70, 4, 8, dtype, fast);
        check(kind, 300, 280, 12, 16, dtype, fast);
        check(kind, 30, 50, 6, 8, dtype, fast);
        check(kind, 50, 30, 6, 8, dtype, fast);
        check(kind, 17, 9, 1, 1, dtype, fast);
      }
    }
  }
}

TEST_CASE("what is left of clients that cancel counts as zero, on every route") {
  for (const DType dtype : {DType::fp32, DType::fp64}) {
    for (const auto& [m, n, r] :
         {std::tuple{37, 53, 6}, {31, 17, 10}, {19, 29, 12}, {90, 81, 36}}) {
      CAPTURE(m);
      const int64_t rank = 2 * r;
      Matrix b = rounded(random(m, rank, 1), dtype);
      Matrix a = rounded(random(rank, n, 2), dtype);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t k = 0; k < r; ++k) b[i * rank + r + k] = -b[i * rank + k];
      }
      std::copy_n(a.begin(), r * n, a.begin() + r * n);
      const Side left(b, false, {r, r}, m, dtype);
      const Side right(a, true, {r, r}, n, dtype);
      Matrix scale(static_cast<size_t>(rank), 0.3);
      std::fill_n(scale.begin(), r, 3 * 0.1);  // one unit in the last place more
      const int64_t width = std::min<int64_t>({rank, m, n});
      std::vector<char> b_g(static_cast<size_t>(m * width * bytes_of(dtype)));
      std::vector<char> a_g(static_cast<size_t>(n * width * bytes_of(dtype)));
      Matrix sigma(static_cast<size_t>(rank));
      int64_t p = -1;
      stacked_svd(left.factors(), right.factors(), scale.data(), {1.0, width, false}, 2,
                  {b_g.data(), a_g.data(), sigma.data(), &p});
      CHECK(p == 0);
      CHECK(largest(sigma) == 0);
    }
  }
}

TEST_CASE("factors that are not finite are refused") {
  for (const DType dtype : {DType::fp32, DType::fp64}) {
    for (const int64_t rank : {4, 40}) {
      Matrix b = random(20, rank, 1);
      const Matrix a = random(rank, 30, 2);
      b[3] = std::numeric_limits<double>::quiet_NaN();
      const Side left(b, false, {rank}, 20, dtype);
      const Side right(a, true, {rank}, 30, dtype);
      const Matrix scale(static_cast<size_t>(rank), 1.0);
      std::vector<char> b_g(20 * 4 * 8), a_g(30 * 4 * 8);
      Matrix sigma(static_cast<size_t>(rank));
      int64_t p = 0;
      CHECK_THROWS_AS(stacked_svd(left.factors(), right.factors(), scale.data(), {0.9, 4, false}, 1,
                                  {b_g.data(), a_g.data(), sigma.data(), &p}),
                      std::runtime_error);
    }
  }
}

TEST_CASE("ranks at the edges of the energy") {
  const double sigma[] = {3, 2, 1, 1e-9};
  CHECK(select_rank(sigma, 4, 14, 9.0 / 14, 4) == 1);
  CHECK(select_rank(sigma, 4, 14, 9.01 / 14, 4) == 2);
  CHECK(select_rank(sigma, 4, 14, 1.0, 4) == 3);
  CHECK(select_rank(sigma, 4, 14, 1.0, 2) == 2);
  const double zeros[] = {0, 0};
  CHECK(select_rank(zeros, 2, 0, 0.9, 2) == 0);
}

}  // namespace fedlora::tests
