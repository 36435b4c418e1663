#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "cuda/surrogate/surrogate.h"
#include "emulator/emulator.h"
#include "matrices.h"

namespace fedlora::tests {
namespace {

struct Clients {
  int64_t m, n, count, r;
  Matrix b, a, weights, scale;

  int64_t rank() const { return count * r; }
};

Clients family(const std::string& kind, int64_t m, int64_t n, int64_t count, int64_t r,
               uint64_t seed) {
  Clients clients = {m,
                     n,
                     count,
                     r,
                     random(m, count * r, seed),
                     random(count * r, n, seed + 1),
                     Matrix(static_cast<size_t>(count)),
                     Matrix(static_cast<size_t>(count))};
  const int64_t rank = clients.rank();
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += clients.weights[k] = 1 + static_cast<double>(k % 3);
  for (int64_t k = 0; k < count; ++k) {
    clients.weights[k] /= sum;
    clients.scale[k] = kind == "signed" && k % 2 == 1 ? -2 : 1 + 0.5 * static_cast<double>(k % 2);
  }
  for (int64_t k = 0; k < rank; ++k) {
    const int64_t client = k / r;
    for (int64_t j = 0; j < n; ++j) {
      double& value = clients.a[k * n + j];
      const double first = clients.a[k % r * n + j];
      if (kind == "shared start" && client > 0) value = first + 0.01 * value;
      if (kind == "duplicates" && client > 0) value = first;
      if (kind == "sign flipped" && client % 2 == 1) value = -clients.a[(k - r) * n + j];
      if (kind == "badly scaled" && client == 1) value *= 1e-6;
      if (kind == "tiny") value *= 1e-40;
      if (kind == "zero client" && client == 1) value = 0;
    }
    for (int64_t i = 0; i < m; ++i) {
      double& value = clients.b[i * rank + k];
      if (kind == "duplicates" && client > 0) value = clients.b[i * rank + k % r];
      if (kind == "sign flipped" && client % 2 == 1) value = -clients.b[i * rank + k - r];
      if (kind == "badly scaled" && client == 1) value *= 1e6;
      if (kind == "zero" || (kind == "zero client" && client == 1)) value = 0;
    }
  }
  return clients;
}

struct Result {
  Matrix p, q, objective;
};

Result run(const Clients& clients, int64_t sweeps, double tolerance) {
  const int64_t rank = clients.rank();
  const Matrix gram_b =
      product(transposed(clients.b, clients.m, rank), clients.b, rank, clients.m, rank);
  const Matrix gram_a =
      product(clients.a, transposed(clients.a, rank, clients.n), rank, clients.n, rank);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Result result = {Matrix(static_cast<size_t>(clients.count), nan),
                   Matrix(static_cast<size_t>(clients.count), nan),
                   Matrix(static_cast<size_t>(sweeps + 1), nan)};
  Matrix workspace(
      cuda::surrogate_workspace(1, clients.count, clients.r, sweeps) / sizeof(double) + 1, nan);
  cuda::surrogate(1, clients.count, clients.r, gram_b.data(), gram_a.data(), clients.weights.data(),
                  clients.scale.data(), {sweeps, tolerance}, result.p.data(), result.q.data(),
                  result.objective.data(), workspace.data(), {});
  return result;
}

// || sum_k w_k s_k B_k A_k - (sum_u q_u s_u B_u) (sum_v p_v A_v) ||^2 and the terms' magnitude^2,
// from dense matrices.
struct Distance {
  double square;
  double size;
};

Distance distance_of(const Clients& clients, const Matrix& p, const Matrix& q) {
  const int64_t m = clients.m, n = clients.n, r = clients.r, rank = clients.rank();
  Matrix scaled = clients.b;
  Matrix mixed_b(static_cast<size_t>(m * r), 0.0), mixed_a(static_cast<size_t>(r * n), 0.0);
  double size = 0;
  for (int64_t k = 0; k < rank; ++k) {
    const int64_t client = k / r;
    double norm_b = 0, norm_a = 0;
    for (int64_t i = 0; i < m; ++i) {
      double& value = scaled[i * rank + k];
      norm_b += value * value;
      mixed_b[i * r + k % r] += q[client] * clients.scale[client] * value;
      value *= clients.weights[client] * clients.scale[client];
    }
    for (int64_t j = 0; j < n; ++j) {
      norm_a += clients.a[k * n + j] * clients.a[k * n + j];
      mixed_a[k % r * n + j] += p[client] * clients.a[k * n + j];
    }
    size += std::abs(clients.weights[client] * clients.scale[client]) * std::sqrt(norm_b * norm_a);
  }
  Matrix error = product(scaled, clients.a, m, rank, n);
  const Matrix mean = product(mixed_b, mixed_a, m, r, n);
  double square = 0, largest = 0;
  for (size_t i = 0; i < error.size(); ++i) {
    square += std::pow(error[i] - mean[i], 2);
    largest += mean[i] * mean[i];
  }
  return {square, size * size + largest};
}

// What holds for any family and any number of sweeps.
void check(const Clients& clients, const Result& result) {
  const double eps = std::numeric_limits<double>::epsilon();
  const double rounding = 32 * static_cast<double>(clients.rank()) * eps;
  double norm_p = 0, norm_q = 0;
  for (size_t k = 0; k < result.p.size(); ++k) {
    norm_p += result.p[k] * result.p[k];
    norm_q += result.q[k] * result.q[k];
  }
  CHECK(std::sqrt(norm_p) == doctest::Approx(std::sqrt(norm_q)).epsilon(1e-12));
  for (size_t i = 1; i < result.objective.size(); ++i) {
    REQUIRE(result.objective[i] <= result.objective[i - 1]);
  }
  const Distance start = distance_of(clients, clients.weights, clients.weights);
  CHECK(std::abs(result.objective[0] - start.square) <= rounding * start.size);
  const Distance end = distance_of(clients, result.p, result.q);
  CHECK(std::abs(result.objective.back() - end.square) <= rounding * end.size);
}

// f's minimum from many sweeps of the CPU's solver, which shares no code with the kernel.
double minimum(const Clients& clients) {
  const int64_t rank = clients.rank(), sweeps = 2000;
  const Matrix gram_b =
      product(transposed(clients.b, clients.m, rank), clients.b, rank, clients.m, rank);
  const Matrix gram_a =
      product(clients.a, transposed(clients.a, rank, clients.n), rank, clients.n, rank);
  Matrix p(static_cast<size_t>(clients.count)), q(p.size());
  Matrix objective(static_cast<size_t>(sweeps + 1));
  fedlora::surrogate(clients.count, clients.r, gram_b.data(), gram_a.data(), clients.weights.data(),
                     clients.scale.data(), {sweeps, 0}, p.data(), q.data(), objective.data());
  return objective.back();
}

}  // namespace

TEST_CASE("surrogate on the device: the objective is the error, never rises, reaches the minimum") {
  for (const std::string kind : {"independent", "shared start", "duplicates", "zero client", "zero",
                                 "sign flipped", "badly scaled", "tiny", "signed"}) {
    CAPTURE(kind);
    for (const auto& [count, r] : {std::pair<int64_t, int64_t>{4, 3}, {7, 1}, {2, 6}, {1, 2}}) {
      CAPTURE(count);
      if (count == 1 && (kind == "zero client" || kind == "sign flipped")) continue;
      const Clients clients = family(kind, 23, 29, count, r, 1);
      const Result result = run(clients, 60, 0);
      check(clients, result);
      const Distance none = distance_of(clients, Matrix(static_cast<size_t>(count), 0.0),
                                        Matrix(static_cast<size_t>(count), 0.0));
      CHECK(result.objective.back() <= minimum(clients) + 1e-5 * none.square + 1e-12 * none.size);
      if (kind == "duplicates" || count == 1 || (kind == "sign flipped" && count == 2)) {
        CHECK(result.objective.back() <= 1e-12 * none.size);
      }
    }
  }
}

TEST_CASE("surrogate on the device: memory beyond the block's, and the threads' order") {
  for (const std::string kind : {"independent", "duplicates"}) {
    CAPTURE(kind);
    const Clients clients = family(kind, 31, 37, 11, 2, 3);
    const Result first = run(clients, 5, 0);
    check(clients, first);
    for (const size_t bytes : {size_t{12000}, size_t{9216}}) {
      for (const uint64_t seed : {2, 3}) {
        const emulator::Setting setting({132, bytes, 80}, seed);
        const Result other = run(clients, 5, 0);
        CHECK(other.p == first.p);
        CHECK(other.q == first.q);
        CHECK(other.objective == first.objective);
      }
    }
  }
}

TEST_CASE("surrogate on the device: many clients, and entries for more than one pass") {
  const Clients many = family("shared start", 20, 21, 40, 1, 2);
  check(many, run(many, 3, 0));
  const Clients wide = family("independent", 30, 26, 2, 25, 2);
  check(wide, run(wide, 3, 0));
  // More clients than a block has threads.
  const Clients crowd = family("independent", 17, 19, 260, 1, 1);
  check(crowd, run(crowd, 1, 0));
}

TEST_CASE("surrogate on the device: the tolerance stops early and repeats the last value") {
  const Clients clients = family("independent", 23, 29, 5, 2, 4);
  const Result loose = run(clients, 40, 1e-3);
  check(clients, loose);
  CHECK(loose.objective[25] == loose.objective.back());
  CHECK(run(clients, 40, 0).objective.back() <= loose.objective.back());
}

TEST_CASE("surrogate on the device: what is not finite comes back as it is") {
  Clients clients = family("independent", 23, 29, 3, 2, 4);
  clients.b[5] = std::numeric_limits<double>::quiet_NaN();
  const Result result = run(clients, 4, 0);
  for (const double value : result.objective) CHECK(std::isnan(value));
}

}  // namespace fedlora::tests
