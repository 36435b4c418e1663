// The public header, on two modules and three clients with gaps between their rows.
#include <doctest/doctest.h>
#include <fedlora/fedlora.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "matrices.h"

namespace fedlora::tests {
namespace {

constexpr int64_t kModules = 2;
constexpr int64_t kClients = 3;
constexpr int64_t kM = 23;
constexpr int64_t kN = 17;
constexpr int64_t kGap = 2;
constexpr double kEps = 0x1p-52;

// Factors of all clients, and the same side by side.
struct Problem {
  std::vector<Matrix> memory;
  std::vector<flk::Matrix> b, a;
  std::vector<Matrix> stacked_b, stacked_a;
  std::vector<int64_t> ranks;
  int64_t rank = 0;

  explicit Problem(std::vector<int64_t> each) : ranks(std::move(each)) {
    for (const int64_t r : ranks) rank += r;
    memory.reserve(2 * kModules * kClients);
    for (uint64_t l = 0; l < kModules; ++l) {
      Matrix wide(static_cast<size_t>(kM * rank));
      Matrix tall;
      int64_t column = 0;
      for (uint64_t k = 0; k < kClients; ++k) {
        const int64_t r = ranks[k];
        const Matrix& b_k = memory.emplace_back(random(kM, r + kGap, 10 * l + k + 1));
        b.push_back({b_k.data(), kM, r, r + kGap});
        for (int64_t i = 0; i < kM; ++i) {
          std::copy_n(b_k.data() + i * (r + kGap), r, wide.data() + i * rank + column);
        }
        column += r;
        const Matrix& a_k = memory.emplace_back(random(r, kN, 10 * l + k + 5));
        a.push_back({a_k.data(), r, kN});
        tall.insert(tall.end(), a_k.begin(), a_k.end());
      }
      stacked_b.push_back(wide);
      stacked_a.push_back(tall);
    }
  }

  flk::Factors of_b() const { return {flk::DType::fp64, kModules, b}; }
  flk::Factors of_a() const { return {flk::DType::fp64, kModules, a}; }

  // weight times scaling of every client, at each of its ranks
  Matrix scale(const Matrix& terms) const {
    Matrix result;
    for (int64_t l = 0; l < kModules; ++l) {
      for (size_t k = 0; k < kClients; ++k) {
        result.insert(result.end(), static_cast<size_t>(ranks[k]), terms[k]);
      }
    }
    return result;
  }

  Matrix update(int64_t module, const Matrix& diagonal) const {
    Matrix scaled = stacked_b[static_cast<size_t>(module)];
    for (int64_t i = 0; i < kM; ++i) {
      for (int64_t j = 0; j < rank; ++j) scaled[i * rank + j] *= diagonal[module * rank + j];
    }
    return product(scaled, stacked_a[static_cast<size_t>(module)], kM, rank, kN);
  }
};

Matrix part(const Matrix& all, int64_t module, int64_t size) {
  return Matrix(all.begin() + module * size, all.begin() + (module + 1) * size);
}

Matrix empty(int64_t size) {
  return Matrix(static_cast<size_t>(size), std::numeric_limits<double>::quiet_NaN());
}

std::string refusal(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was refused";
}

}  // namespace

TEST_CASE("fedlora.h: FLoRIST in one call, and step by step") {
  const Problem problem({1, 3, 2});
  const int64_t rank = problem.rank;
  const Matrix scale = problem.scale({0.5, 0.75, -0.25});
  for (const int threads : {0, 1, 3}) {
    Matrix gram_b = empty(kModules * rank * rank);
    Matrix gram_a = gram_b;
    flk::gram(problem.of_b(), false, gram_b.data(), {threads});
    flk::gram(problem.of_a(), true, gram_a.data(), {threads});
    const Matrix scalings = {0.5, 0.75, -0.25, 0.5, 0.75, -0.25};
    Matrix products = empty(kModules * kClients * kClients);
    flk::client_products(kModules, problem.ranks, gram_b.data(), gram_a.data(), scalings.data(),
                         products.data(), {threads});
    for (int64_t l = 0; l < kModules; ++l) {
      // All of a module together are the squared norm of the sum of its clients' updates.
      Matrix scaled = problem.stacked_b[static_cast<size_t>(l)];
      for (int64_t i = 0; i < kM * rank; ++i) scaled[i] *= scale[l * rank + i % rank];
      double square = 0;
      for (const double entry :
           product(scaled, problem.stacked_a[static_cast<size_t>(l)], kM, rank, kN)) {
        square += entry * entry;
      }
      double sum = 0;
      for (int64_t i = 0; i < kClients * kClients; ++i) {
        sum += products[l * kClients * kClients + i];
      }
      CHECK(std::abs(sum - square) <= 1e-13 * square);
    }
    Matrix sigma = empty(kModules * rank);
    Matrix total = empty(kModules);
    Matrix left = empty(kModules * rank * rank);
    Matrix right = left;
    std::vector<int64_t> info(kModules, -1);
    flk::spectrum(kModules, rank, gram_b.data(), gram_a.data(), scale.data(), 1.0, flk::kAny,
                  {sigma.data(), total.data(), left.data(), right.data(), info.data()}, {threads});
    CHECK(info == std::vector<int64_t>(kModules, 0));
    std::vector<int64_t> ranks(kModules, -1);
    flk::select_rank(kModules, rank, sigma.data(), total.data(), 0.9, flk::kAny, ranks.data());
    Matrix b_g = empty(kModules * kM * rank);
    Matrix a_g = empty(kModules * rank * kN);
    flk::combine(problem.of_b(), problem.of_a(), rank, left.data(), right.data(), b_g.data(),
                 a_g.data(), {threads});

    Matrix svd_b = empty(kModules * kM * rank);
    Matrix svd_a = empty(kModules * rank * kN);
    Matrix values = empty(kModules * rank);
    std::vector<int64_t> chosen(kModules, -1);
    flk::stacked_svd(problem.of_b(), problem.of_a(), scale.data(), 0.9, rank,
                     {svd_b.data(), svd_a.data(), values.data(), chosen.data()}, {threads});
    CHECK(chosen == ranks);
    for (int64_t l = 0; l < kModules; ++l) {
      const Matrix& b = problem.stacked_b[static_cast<size_t>(l)];
      const Matrix& a = problem.stacked_a[static_cast<size_t>(l)];
      const Matrix g_b = product(transposed(b, kM, rank), b, rank, kM, rank);
      const Matrix g_a = product(a, transposed(a, rank, kN), rank, kN, rank);
      CHECK(distance(part(gram_b, l, rank * rank), g_b) <= 4 * kM * kEps);
      CHECK(distance(part(gram_a, l, rank * rank), g_a) <= 4 * kN * kEps);
      const Matrix ideal = problem.update(l, scale);
      const Matrix stepwise =
          product(part(b_g, l, kM * rank), part(a_g, l, rank * kN), kM, rank, kN);
      // Two Gram matrices keep half of the digits of the smallest singular values.
      CHECK(distance(stepwise, ideal) <= 1e-9 * largest(ideal));
      const Matrix found =
          product(part(svd_b, l, kM * rank), part(svd_a, l, rank * kN), kM, rank, kN);
      double missed = 0;
      for (int64_t i = chosen[static_cast<size_t>(l)]; i < rank; ++i) {
        missed += sigma[l * rank + i] * sigma[l * rank + i];
      }
      double error = 0;
      for (size_t i = 0; i < ideal.size(); ++i) error += std::pow(found[i] - ideal[i], 2);
      CHECK(missed > 0);
      CHECK(std::abs(error / missed - 1) <= 1e-9);
    }
  }
}

TEST_CASE("fedlora.h: FLoRA-NA in one call, and step by step") {
  const Problem problem({2, 2, 2});
  const int64_t rank = problem.rank;
  const Matrix weights = {0.5, 0.25, 0.25};
  const Matrix scale = {2, 1, 1, 0.5, 3, 2};
  constexpr int64_t kSteps = 51;
  Matrix b_hat = empty(kModules * kM * 2), a_hat = empty(kModules * 2 * kN);
  Matrix p = empty(kModules * kClients), q = p, objective = empty(kModules * kSteps);
  flk::flora_na(problem.of_b(), problem.of_a(), weights.data(), scale.data(),
                {b_hat.data(), a_hat.data(), p.data(), q.data(), objective.data()});
  Matrix gram_b = empty(kModules * rank * rank), gram_a = gram_b;
  flk::gram(problem.of_b(), false, gram_b.data());
  flk::gram(problem.of_a(), true, gram_a.data());
  Matrix left = p, right = q, errors = objective;
  flk::surrogate(kModules, kClients, rank, gram_b.data(), gram_a.data(), weights.data(),
                 scale.data(), kSteps - 1, 1e-12, {left.data(), right.data(), errors.data()});
  CHECK(distance(left, p) <= 1e-9 * largest(p));
  CHECK(distance(right, q) <= 1e-9 * largest(q));
  for (int64_t l = 0; l < kModules; ++l) {
    Matrix mean(static_cast<size_t>(kM * 2), 0.0);
    for (int64_t k = 0; k < kClients; ++k) {
      for (int64_t i = 0; i < kM; ++i) {
        for (int64_t j = 0; j < 2; ++j) {
          mean[i * 2 + j] += q[l * kClients + k] * scale[l * kClients + k] *
                             problem.stacked_b[static_cast<size_t>(l)][i * rank + 2 * k + j];
        }
      }
    }
    CHECK(distance(part(b_hat, l, kM * 2), mean) <= 8 * kEps * largest(mean));
    Matrix diagonal = problem.scale({0, 0, 0});
    for (int64_t j = 0; j < rank; ++j) {
      diagonal[l * rank + j] = weights[static_cast<size_t>(j / 2)] * scale[l * kClients + j / 2];
    }
    const Matrix ideal = problem.update(l, diagonal);
    const Matrix found = product(part(b_hat, l, kM * 2), part(a_hat, l, 2 * kN), kM, 2, kN);
    double error = 0;
    for (size_t i = 0; i < ideal.size(); ++i) error += std::pow(found[i] - ideal[i], 2);
    CHECK(std::abs(error / objective[(l + 1) * kSteps - 1] - 1) <= 1e-9);
  }
}

TEST_CASE("fedlora.h: weighted sums of bfloat16") {
  const Matrix values = rounded(random(kModules * kClients, 40, 3), DType::bf16);
  const std::vector<char> stacked = narrowed(values, DType::bf16);
  const Matrix weights = {0.5, 0.25, 0.25, 1, -1, 2};
  std::vector<char> out(static_cast<size_t>(kModules * 40 * 2));
  flk::weighted_sum(flk::DType::bf16, kModules, kClients, 40, stacked.data(), weights.data(),
                    out.data());
  Matrix expected(static_cast<size_t>(kModules * 40), 0.0);
  for (int64_t i = 0; i < kModules * kClients; ++i) {
    for (int64_t j = 0; j < 40; ++j) {
      expected[i / kClients * 40 + j] += weights[static_cast<size_t>(i)] * values[i * 40 + j];
    }
  }
  CHECK(distance(widened(out, DType::bf16), expected) <= 0x1p-8 * largest(expected));
}

TEST_CASE("fedlora.h: what is wrong is named, and nothing is written") {
  const Problem problem({1, 3, 2});
  Problem torn({1, 3, 2});
  torn.b[4].columns = 2;
  Problem overlapping({1, 3, 2});
  overlapping.b[1].stride = 2;
  const Matrix scale = problem.scale({1, 1, 1});
  Matrix out = {7};
  const flk::Svd result = {out.data(), out.data(), out.data(), nullptr};
  const auto svd = [&](const flk::Factors& b, const flk::Factors& a, double energy, int64_t width) {
    return refusal([&] { flk::stacked_svd(b, a, scale.data(), energy, width, result); });
  };
  const flk::Factors b = problem.of_b(), a = problem.of_a();
  CHECK(svd(b, a, 1.5, 6) == "energy must lie in (0, 1], found 1.5");
  CHECK(svd(b, a, 0.9, -1) == "max_rank must be at least 1, found -1");
  CHECK(svd(torn.of_b(), a, 0.9, 6).starts_with("b[4]"));
  CHECK(svd(overlapping.of_b(), a, 0.9, 6) ==
        "b[1]: the stride must be at least the 3 columns, found 2");
  CHECK(svd({flk::DType::fp64, 1, problem.b}, a, 0.9, 6) ==
        "b and a must have equal numbers of modules, found 1 and 2");
  for (const int64_t modules : {int64_t{0}, int64_t{-2}, int64_t{5}}) {
    CHECK(
        svd({flk::DType::fp64, modules, problem.b}, {flk::DType::fp64, modules, problem.a}, 0.9, 6)
            .find(std::to_string(modules) + " modules") != std::string::npos);
  }
  CHECK(refusal([&] { flk::flora_na(b, a, scale.data(), scale.data(), {}); }) !=
        "nothing was refused");
  CHECK(out == Matrix{7});
}

}  // namespace fedlora::tests
