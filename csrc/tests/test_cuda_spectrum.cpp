#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "core/lapack.h"
#include "cuda/eigensolver/eigensolver.h"
#include "cuda/spectrum/leading.h"
#include "cuda/spectrum/spectrum.h"
#include "emulator/emulator.h"
#include "matrices.h"

namespace fedlora::tests {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kTerms = 32;  // c of the bound c R eps magnitude^2 on squared singular values

struct Stack {
  int64_t m, n, rank;
  Matrix b, a, scale;
};

Stack family(const std::string& kind, int64_t m, int64_t n, int64_t clients, int64_t r,
             uint64_t seed) {
  const int64_t rank = clients * r;
  Stack stack = {m,
                 n,
                 rank,
                 random(m, rank, seed),
                 random(rank, n, seed + 1),
                 Matrix(static_cast<size_t>(rank), 2.0 / static_cast<double>(clients))};
  for (int64_t k = 0; k < rank; ++k) {
    const int64_t client = k / r;
    for (int64_t j = 0; j < n; ++j) {
      double& value = stack.a[k * n + j];
      const double first = stack.a[k % r * n + j];
      if (kind == "shared start" && client > 0) value = first + 1e-3 * value;
      if (kind == "duplicates" && client > 0) value = first;
      if (kind.ends_with("canceling") && client > 0) value = first;
      if (kind == "zero") value = 0;
      if (kind == "badly scaled" && client == 0) value *= 1e-8;
      if (kind == "tiny") value *= 1e-60;
      if (kind == "huge") value *= 1e60;
    }
    for (int64_t i = 0; i < m; ++i) {
      double& value = stack.b[i * rank + k];
      if (kind == "badly scaled" && client == 0) value *= 1e8;
      if (kind == "duplicates" && client > 0) value = stack.b[i * rank + k % r];
      if (kind == "canceling" && client > 0) {
        value = (client % 2 == 0 ? 1 : -1) * stack.b[i * rank + k % r];
      }
      if (kind == "nearly canceling" && client == 1) {
        value = 1e-3 * value - stack.b[i * rank + k % r];
      }
      if (kind == "no B" && client == 1) value = 0;
      if (kind == "graded") value *= std::pow(3.0, -static_cast<double>(k));
    }
    if (kind == "no weight" && client == 0) stack.scale[k] = 0;
    if (kind == "signed" && client % 2 == 1) stack.scale[k] *= -3;
  }
  return stack;
}

struct Result {
  Matrix sigma, total_energy, left, right;
  std::vector<int64_t> info;
};

Result run(int64_t modules, int64_t rank, const Matrix& gram_b, const Matrix& gram_a,
           const Matrix& scale, const cuda::SpectrumOptions& options = {},
           cuda::Stream stream = {}) {
  const auto square = static_cast<size_t>(modules * rank * rank);
  const auto vector = static_cast<size_t>(modules * rank);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Result result = {Matrix(vector, nan), Matrix(static_cast<size_t>(modules), nan),
                   Matrix(square, nan), Matrix(square, nan),
                   std::vector<int64_t>(static_cast<size_t>(modules), -1)};
  Matrix workspace(cuda::spectrum_workspace(modules, rank, stream) / sizeof(double) + 1, nan);
  cuda::spectrum(modules, rank, gram_b.data(), gram_a.data(), scale.data(), options,
                 {result.sigma.data(), result.total_energy.data(), result.left.data(),
                  result.right.data(), result.info.data()},
                 workspace.data(), stream);
  return result;
}

Matrix gram_b_of(const Stack& stack) {
  return product(transposed(stack.b, stack.m, stack.rank), stack.b, stack.rank, stack.m,
                 stack.rank);
}

Matrix gram_a_of(const Stack& stack) {
  return product(stack.a, transposed(stack.a, stack.rank, stack.n), stack.rank, stack.n,
                 stack.rank);
}

double norm(const Matrix& matrix) {
  double square = 0;
  for (const double value : matrix) square += value * value;
  return std::sqrt(square);
}

// The contract against a dense SVD of the update.
void check_module(const Stack& stack, const Result& result, int64_t module) {
  const int64_t m = stack.m, n = stack.n, rank = stack.rank, least = std::min(m, n);
  const Matrix left(result.left.begin() + module * rank * rank,
                    result.left.begin() + (module + 1) * rank * rank);
  const Matrix right(result.right.begin() + module * rank * rank,
                     result.right.begin() + (module + 1) * rank * rank);
  const double* sigma = result.sigma.data() + module * rank;
  Matrix scaled = stack.b;
  double magnitude = 0;
  for (int64_t k = 0; k < rank; ++k) {
    double square_b = 0, square_a = 0;
    for (int64_t i = 0; i < m; ++i) square_b += std::pow(stack.b[i * rank + k], 2);
    for (int64_t j = 0; j < n; ++j) square_a += std::pow(stack.a[k * n + j], 2);
    magnitude += std::abs(stack.scale[k]) * std::sqrt(square_b) * std::sqrt(square_a);
    for (int64_t i = 0; i < m; ++i) scaled[i * rank + k] *= stack.scale[k];
  }
  const double noise = kTerms * static_cast<double>(rank) * kEps * magnitude * magnitude;
  const Matrix update = product(scaled, stack.a, m, rank, n);
  Matrix work = update, u(static_cast<size_t>(n * least)), vt(static_cast<size_t>(least * m)),
         values(static_cast<size_t>(least));
  REQUIRE(lapack::svd(n, m, work.data(), values.data(), u.data(), vt.data()));

  REQUIRE(result.info[module] == 0);
  CHECK(std::abs(result.total_energy[module] - std::pow(norm(update), 2)) <= noise);
  for (int64_t i = 0; i < rank; ++i) {
    const double expected = i < least ? values[i] * values[i] : 0;
    REQUIRE(std::abs(sigma[i] * sigma[i] - expected) <= noise);
    if (i > 0) REQUIRE(sigma[i] <= sigma[i - 1]);
    for (int64_t j = 0; j < rank && sigma[i] == 0; ++j) {
      REQUIRE(left[j * rank + i] == 0);
      REQUIRE(right[i * rank + j] == 0);
    }
  }
  const Matrix principal = product(stack.b, left, m, rank, rank);
  const Matrix squares = product(transposed(principal, m, rank), principal, rank, m, rank);
  const Matrix rows = product(right, stack.a, rank, rank, n);
  const Matrix ones = product(rows, transposed(rows, rank, n), rank, n, rank);
  const Matrix projected = product(update, transposed(rows, rank, n), m, n, rank);
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t j = 0; j < rank; ++j) {
      const double square = i == j ? sigma[i] * sigma[i] : 0;
      CHECK(std::abs(squares[i * rank + j] - square) <= noise);
      const double smaller = std::min(sigma[i], sigma[j]);
      if (smaller * smaller <= noise) continue;
      const double one = i == j ? 1 : 0;
      CHECK(std::abs(ones[i * rank + j] - one) <= noise / (smaller * smaller));
    }
    for (int64_t k = 0; k < m && sigma[i] * sigma[i] > noise; ++k) {
      const double error = std::abs(projected[k * rank + i] - principal[k * rank + i]);
      CHECK(error <= 1e-10 * magnitude + noise / sigma[i]);
    }
  }
  Matrix error = product(principal, rows, m, rank, n);
  for (size_t i = 0; i < error.size(); ++i) error[i] -= update[i];
  CHECK(norm(error) <= 1e-10 * magnitude + std::sqrt(static_cast<double>(rank) * noise));
}

void check(const std::string& kind, int64_t clients, int64_t r, int64_t m = 53, int64_t n = 61,
           cuda::Stream stream = {}) {
  CAPTURE(kind);
  CAPTURE(clients);
  CAPTURE(r);
  const Stack stack = family(kind, m, n, clients, r, 1);
  const Result result =
      run(1, stack.rank, gram_b_of(stack), gram_a_of(stack), stack.scale, {}, stream);
  check_module(stack, result, 0);
}

}  // namespace

TEST_CASE("spectrum on the device: every family") {
  for (const char* kind :
       {"independent", "shared start", "duplicates", "canceling", "nearly canceling", "zero",
        "badly scaled", "tiny", "huge", "no B", "graded", "no weight", "signed"}) {
    check(kind, 3, 5);
    check(kind, 1, 1);
    check(kind, 2, 4);
  }
}

TEST_CASE("spectrum on the device: sizes around the lanes, chunks and tiles") {
  for (const int64_t rank : {2, 3, 7, 8, 9, 16, 17, 24, 31, 32, 33, 40, 65}) {
    check("shared start", 1, rank);
  }
}

TEST_CASE("spectrum on the device: clusters of 2, 4 and 8 blocks, and the vendor's solver") {
  // 18 KB of shared memory: R = 60 needs two blocks, 80 four, 120 eight, 150 the vendor's solver;
  // without clusters all do.
  for (const int capability : {90, 80}) {
    CAPTURE(capability);
    const emulator::Setting setting({132, 18000, capability});
    for (const char* kind : {"independent", "shared start", "canceling"}) {
      check(kind, 5, 12);
      check(kind, 1, 79);
    }
    check("duplicates", 8, 15, 130, 140);
    check("independent", 8, 15, 130, 140);
    check("zero", 8, 15);
  }
  const emulator::Setting setting({132, 18000, 90});
  check("shared start", 15, 10, 70, 200);
}

TEST_CASE("spectrum on the device: a captured stream gets clusters, others the vendor's solver") {
  for (const int64_t r : {100, 160, 230}) {  // 2, 4 and 8 blocks
    CHECK(cuda::eigensolver_of(2 * r, false).blocks == 0);
    check("shared start", 2, r, 29, 31);
    check("shared start", 2, r, 29, 31, cuda::kCaptured);
  }
  CHECK_THROWS_WITH_AS(cuda::spectrum_workspace(1, 473, cuda::kCaptured),
                       "a stacked rank of 473 needs cuSOLVER, which cannot be captured into a CUDA "
                       "graph",
                       std::runtime_error);
}

TEST_CASE("spectrum on the device: A100") {
  const emulator::Setting setting(emulator::kA100);
  check("shared start", 3, 11);
}

TEST_CASE("spectrum on the device: modules do not mix, and the threads' order changes no bit") {
  const char* kinds[] = {"independent", "zero", "shared start", "tiny", "canceling"};
  const int64_t rank = 22, square = rank * rank, modules = 5;
  Matrix gram_b, gram_a, scale;
  std::vector<Stack> stacks;
  for (const char* kind : kinds) {
    stacks.push_back(family(kind, 53, 61, 2, 11, 5));
    const Matrix own_b = gram_b_of(stacks.back()), own_a = gram_a_of(stacks.back());
    gram_b.insert(gram_b.end(), own_b.begin(), own_b.end());
    gram_a.insert(gram_a.end(), own_a.begin(), own_a.end());
    scale.insert(scale.end(), stacks.back().scale.begin(), stacks.back().scale.end());
  }
  for (const size_t bytes : {size_t{232448}, size_t{18000}}) {
    const auto with_seed = [&](uint64_t seed) {
      const emulator::Setting setting({132, bytes, 90}, seed);
      return run(modules, rank, gram_b, gram_a, scale);
    };
    const Result first = with_seed(1);
    for (int64_t module = 0; module < modules; ++module) {
      check_module(stacks[module], first, module);
      const auto part = [&](const Matrix& whole, int64_t size) {
        return Matrix(whole.begin() + module * size, whole.begin() + (module + 1) * size);
      };
      const Result alone =
          run(1, rank, part(gram_b, square), part(gram_a, square), part(scale, rank));
      CHECK(alone.sigma == part(first.sigma, rank));
    }
    for (const uint64_t seed : {2, 3}) {
      const Result other = with_seed(seed);
      CHECK(other.sigma == first.sigma);
      CHECK(other.total_energy == first.total_energy);
      CHECK(other.left == first.left);
      CHECK(other.right == first.right);
    }
  }
}

TEST_CASE("spectrum on the device: the leading part beside modules without a certificate") {
  // At R = 70 independent clients have none. 60 KB of shared memory need four blocks, and 40 KB
  // without clusters device memory; they leave independent clients to the vendor.
  const char* kinds[] = {"shared start", "independent", "zero", "graded", "canceling", "no B"};
  const int64_t clients = 5, r = 14, rank = clients * r, modules = 6;
  const double share = 0.9;
  Matrix gram_b, gram_a, scale;
  std::vector<Stack> stacks;
  for (const char* kind : kinds) {
    stacks.push_back(family(kind, 83, 91, clients, r, 7));
    const Matrix own_b = gram_b_of(stacks.back()), own_a = gram_a_of(stacks.back());
    gram_b.insert(gram_b.end(), own_b.begin(), own_b.end());
    gram_a.insert(gram_a.end(), own_a.begin(), own_a.end());
    scale.insert(scale.end(), stacks.back().scale.begin(), stacks.back().scale.end());
  }
  const Result whole = run(modules, rank, gram_b, gram_a, scale);
  for (const cuda::Device& device :
       {emulator::kH200, cuda::Device{132, 60000, 90}, cuda::Device{132, 40000, 80}}) {
    CAPTURE(device.shared_per_block);
    const auto with_seed = [&](uint64_t seed) {
      const emulator::Setting setting(device, seed);
      return run(modules, rank, gram_b, gram_a, scale, {.energy = share});
    };
    const Result part = with_seed(1);
    for (int64_t module = 0; module < modules; ++module) {
      CAPTURE(kinds[module]);
      const double* sigma = part.sigma.data() + module * rank;
      const double* all = whole.sigma.data() + module * rank;
      const double total = whole.total_energy[module];
      double magnitude = 0;
      for (int64_t k = 0; k < rank; ++k) {
        const int64_t place = (module * rank + k) * rank + k;
        magnitude += std::abs(scale[module * rank + k]) * std::sqrt(gram_b[place] * gram_a[place]);
      }
      const double noise = kTerms * static_cast<double>(rank) * kEps * magnitude * magnitude;
      REQUIRE(part.info[module] == 0);
      CHECK(std::abs(part.total_energy[module] - total) <= noise);
      double sum = 0;
      int64_t count = 0;
      for (; count < rank && sigma[count] > 0; ++count) {
        CHECK(std::abs(sigma[count] * sigma[count] - all[count] * all[count]) <= noise);
        sum += sigma[count] * sigma[count];
      }
      CHECK(sum >= (share - 1e-12) * total - noise);
      if (module == 0 || module == 3) CHECK(count < 20);
      if (module == 1) {  // the full route keeps no more than what was asked for
        CHECK(count > 20);
        CHECK(sum - sigma[count - 1] * sigma[count - 1] < share * total);
        const auto zero = [](double value) { return value == 0; };
        for (int64_t i = 0; i < rank; ++i) {
          const double* left = part.left.data() + (module * rank + i) * rank;
          const double* right = part.right.data() + (module * rank + i) * rank;
          CHECK(std::all_of(left + count, left + rank, zero));
          CHECK(std::all_of(right, right + rank, zero) == (i >= count));
        }
      }
    }
    for (const uint64_t seed : {2, 3}) {
      const Result other = with_seed(seed);
      CHECK(other.sigma == part.sigma);
      CHECK(other.left == part.left);
      CHECK(other.right == part.right);
    }
  }
}

TEST_CASE("spectrum on the device: how many blocks hold the leading part") {
  const auto attempts = [](int64_t rank, int64_t cap = 0) {
    std::vector<int> flat;
    for (const auto& each : cuda::leading_attempts(rank, {.energy = 0.9, .cap = cap})) {
      flat.push_back(each.vectors);
      flat.push_back(each.blocks);
    }
    return flat;
  };
  using Flat = std::vector<int>;
  CHECK(attempts(64) == Flat{});
  CHECK(attempts(192) == Flat{32, 1});
  CHECK(attempts(193) == Flat{32, 2});
  CHECK(attempts(255) == Flat{32, 2});
  CHECK(attempts(257) == Flat{32, 4, 64, 8});
  CHECK(attempts(512) == Flat{32, 4, 64, 8});
  CHECK(attempts(512, 16) == Flat{32, 4});
  CHECK(attempts(513) == Flat{32, 8, 64, 0});
  CHECK(attempts(1025) == Flat{32, 0, 64, 0});
  const emulator::Setting setting(emulator::kA100);
  CHECK(attempts(128) == Flat{32, 1});
  CHECK(attempts(512) == Flat{32, 0, 64, 0});
}

TEST_CASE("spectrum on the device: the leading part in 8 blocks") {
  const int64_t clients = 33, r = 16, rank = clients * r;
  Stack stack = family("shared start", 61, 67, clients, r, 3);
  const Matrix gram_b = gram_b_of(stack), gram_a = gram_a_of(stack);
  const Result whole = run(1, rank, gram_b, gram_a, stack.scale);
  const Result part = run(1, rank, gram_b, gram_a, stack.scale, {.energy = 0.99});
  REQUIRE(part.info[0] == 0);
  double sum = 0;
  for (int64_t i = 0; i < rank && part.sigma[i] > 0; ++i) {
    CHECK(std::abs(part.sigma[i] - whole.sigma[i]) <= 1e-12 * whole.sigma[0]);
    sum += part.sigma[i] * part.sigma[i];
  }
  CHECK(sum >= 0.99 * whole.total_energy[0]);
  CHECK(part.sigma[r] == 0);
}

TEST_CASE("spectrum on the device: what is not finite is said, and stays in its module") {
  const int64_t rank = 48, square = rank * rank;
  const Stack stack = family("independent", 53, 61, 2, 24, 1);
  Matrix gram_b = gram_b_of(stack), gram_a = gram_a_of(stack), scale = stack.scale;
  for (Matrix* matrix : {&gram_b, &gram_a, &scale}) {
    const Matrix copy = *matrix;
    for (int64_t i = 0; i < 3; ++i) matrix->insert(matrix->end(), copy.begin(), copy.end());
  }
  gram_b[square + 3 * rank + 3] = std::numeric_limits<double>::quiet_NaN();
  gram_a[2 * square + 4 * rank + 7] = gram_a[2 * square + 7 * rank + 4] =
      std::numeric_limits<double>::infinity();
  for (const size_t bytes : {size_t{232448}, size_t{18000}}) {  // the latter: the vendor's solver
    const emulator::Setting setting({132, bytes, 80});
    const Result result = run(4, rank, gram_b, gram_a, scale);
    check_module(stack, result, 0);
    check_module(stack, result, 3);
    for (const int64_t module : {1, 2}) {
      CHECK(result.info[module] != 0);
      CHECK(std::isnan(result.total_energy[module]));
      for (int64_t i = 0; i < rank; ++i) CHECK(result.sigma[module * rank + i] == 0);
    }
  }
}

TEST_CASE("spectrum on the device: singular values under the shift for float32 sums") {
  const double noise = 4 * std::numeric_limits<float>::epsilon();
  for (const int capability : {90, 80}) {
    const emulator::Setting setting({132, 18000, capability});
    for (const int64_t r : {6, 25}) {
      const Stack stack = family("nearly canceling", 53, 61, 2, r, 1);
      Result result =
          run(1, stack.rank, gram_b_of(stack), gram_a_of(stack), stack.scale, {.noise = noise});
      check_module(stack, result, 0);
    }
  }
}

TEST_CASE("spectrum on the device: float32 sums") {
  // Entries of the Grams off by up to 2e-8 of their norms, as sums in float32 leave them.
  for (const char* kind : {"independent", "shared start", "duplicates"}) {
    CAPTURE(kind);
    const Stack stack = family(kind, 53, 61, 4, 8, 1);
    const int64_t rank = stack.rank;
    Matrix gram_b = gram_b_of(stack), gram_a = gram_a_of(stack);
    const Matrix exact_b = gram_b, exact_a = gram_a;
    const Matrix noise = random(rank, rank, 9);
    for (int64_t i = 0; i < rank; ++i) {
      for (int64_t j = 0; j < rank; ++j) {
        const double off = 2e-8 * noise[std::min(i, j) * rank + std::max(i, j)];
        gram_b[i * rank + j] +=
            off * std::sqrt(exact_b[i * rank + i]) * std::sqrt(exact_b[j * rank + j]);
        gram_a[i * rank + j] -=
            off * std::sqrt(exact_a[i * rank + i]) * std::sqrt(exact_a[j * rank + j]);
      }
    }
    const double single = std::numeric_limits<float>::epsilon();
    Result result = run(1, rank, gram_b, gram_a, stack.scale, {.noise = 4 * single});
    cuda::drop_single_noise(1, rank, gram_b.data(), gram_a.data(), stack.scale.data(),
                            result.sigma.data(), {});
    cuda::right_of_left(1, rank, rank, result.sigma.data(), result.left.data(), gram_b.data(),
                        stack.scale.data(), result.right.data(), {});
    REQUIRE(result.info[0] == 0);

    const int64_t p = 4;
    Matrix x, y(result.right.begin(), result.right.begin() + p * rank);
    for (int64_t i = 0; i < rank * rank; ++i) {
      if (i % rank < p) x.push_back(result.left[i]);
    }
    Matrix scaled = stack.b;
    for (int64_t i = 0; i < stack.m * rank; ++i) scaled[i] *= stack.scale[i % rank];
    const Matrix update = product(scaled, stack.a, stack.m, rank, stack.n);
    Matrix work = update, u(static_cast<size_t>(stack.n * stack.m)),
           vt(static_cast<size_t>(stack.m * stack.m)), values(static_cast<size_t>(stack.m));
    REQUIRE(lapack::svd(stack.n, stack.m, work.data(), values.data(), u.data(), vt.data()));
    double rest = 0;
    for (size_t i = p; i < values.size(); ++i) rest += values[i] * values[i];
    Matrix error = product(product(stack.b, x, stack.m, rank, p),
                           product(y, stack.a, p, rank, stack.n), stack.m, p, stack.n);
    for (size_t i = 0; i < error.size(); ++i) error[i] -= update[i];
    CHECK(norm(error) <= std::sqrt(rest) + 1e-6 * norm(update));
    for (int64_t i = 0; i < rank; ++i) {
      const double expected = values[i] * values[i];
      const double bound = 4 * single * std::pow(norm(update), 2);
      CHECK(std::abs(result.sigma[i] * result.sigma[i] - expected) <= bound);
    }
  }
}

}  // namespace fedlora::tests
