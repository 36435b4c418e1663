#include <doctest/doctest.h>

#include <cmath>
#include <string>

#include "core/flora_na.h"
#include "core/surrogate.h"
#include "matrices.h"

namespace fedlora::tests {
namespace {

constexpr int64_t kSweeps = 50;

// || sum_k w_k s_k B_k A_k - B_hat A_hat ||^2
double error_of(int64_t m, int64_t n, int64_t clients, int64_t r, const Matrix& b, const Matrix& a,
                const Matrix& weights, const Matrix& scale, const Matrix& b_hat,
                const Matrix& a_hat) {
  const int64_t rank = clients * r;
  Matrix scaled = b;
  for (int64_t i = 0; i < m * rank; ++i) scaled[i] *= weights[i % rank / r] * scale[i % rank / r];
  const Matrix ideal = product(scaled, a, m, rank, n);
  const Matrix mixed = product(b_hat, a_hat, m, r, n);
  double square = 0;
  for (size_t i = 0; i < ideal.size(); ++i) square += std::pow(ideal[i] - mixed[i], 2);
  return square;
}

}  // namespace

TEST_CASE("surrogate averages: the objective is the error, never rises and beats FedIT") {
  const int64_t m = 40, n = 30, clients = 4, r = 3, rank = clients * r;
  for (const std::string kind : {"independent", "shared", "duplicates", "zero"}) {
    CAPTURE(kind);
    Matrix b = random(m, rank, 1);
    Matrix a = random(rank, n, 2);
    for (int64_t k = r; k < rank; ++k) {
      for (int64_t j = 0; j < n; ++j) {
        if (kind == "shared") a[k * n + j] = a[k % r * n + j] + 0.01 * a[k * n + j];
        if (kind == "duplicates") a[k * n + j] = a[k % r * n + j];
      }
      for (int64_t i = 0; i < m && kind == "duplicates"; ++i) b[i * rank + k] = b[i * rank + k % r];
    }
    if (kind == "zero") b.assign(b.size(), 0.0);
    const Matrix weights = {0.1, 0.4, 0.3, 0.2};
    const Matrix scale = {2, 1, 0.5, 2};
    const Side left(b, false, {r, r, r, r}, m, DType::fp64);
    const Side right(a, true, {rank}, n, DType::fp64);
    std::vector<char> b_hat(static_cast<size_t>(m * r * 8)), a_hat(static_cast<size_t>(n * r * 8));
    Matrix p(clients), q(clients), objective(kSweeps + 1);
    flora_na(left.factors(), right.factors(), clients, weights.data(), scale.data(), false,
             {kSweeps, 1e-12}, 2,
             {b_hat.data(), a_hat.data(), p.data(), q.data(), objective.data()});
    for (size_t i = 1; i < objective.size(); ++i) CHECK(objective[i] <= objective[i - 1]);
    const double error = error_of(m, n, clients, r, b, a, weights, scale,
                                  widened(b_hat, DType::fp64), widened(a_hat, DType::fp64));
    const double size =
        error_of(m, n, clients, r, b, a, weights, scale, Matrix(static_cast<size_t>(m * r), 0.0),
                 Matrix(static_cast<size_t>(r * n), 0.0));
    CHECK(std::abs(error - objective.back()) <= 1e-12 * size);
    if (kind == "duplicates") CHECK(objective.back() <= 1e-12 * size);
    double norm_p = 0, norm_q = 0;
    for (int64_t k = 0; k < clients; ++k) norm_p += p[k] * p[k], norm_q += q[k] * q[k];
    CHECK(norm_p == doctest::Approx(norm_q));
  }
}

}  // namespace fedlora::tests
