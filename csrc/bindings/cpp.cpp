// fedlora/fedlora.h: the operators on the caller's pointers.
#include <fedlora/fedlora.h>

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>

#include "operators.h"
#include "views.h"

namespace flk {
namespace {

using fedlora::Array;
using fedlora::Arrays;
using fedlora::Host;
using fedlora::Scalar;
using fedlora::Sizes;
using fedlora::WrongValue;

constexpr const char* kNames[] = {"bfloat16", "float16", "float32", "float64"};
constexpr Scalar kScalars[] = {Scalar::bf16, Scalar::fp16, Scalar::fp32, Scalar::fp64};

Array array(const void* data, DType dtype, const Sizes& sizes) {
  const auto type = static_cast<size_t>(dtype);
  return {const_cast<void*>(data), kScalars[type], kNames[type], sizes,
          fedlora::contiguous_strides(sizes)};
}

Array array(const double* data, const Sizes& sizes) { return array(data, DType::fp64, sizes); }

Arrays arrays(const char* side, const Factors& factors) {
  Arrays result;
  result.reserve(factors.matrices.size());
  for (const Matrix& matrix : factors.matrices) {
    Array& added =
        result.emplace_back(array(matrix.data, factors.dtype, {matrix.rows, matrix.columns}));
    if (matrix.stride == 0) continue;
    if (matrix.stride < matrix.columns) {
      throw WrongValue(std::string(side) + "[" + std::to_string(result.size() - 1) +
                       "]: the stride must be at least the " + std::to_string(matrix.columns) +
                       " columns, found " + std::to_string(matrix.stride));
    }
    added.strides[0] = matrix.stride;
  }
  return result;
}

// A host that hands out the caller's memory, in the order in which operators ask for results.
class Caller {
 public:
  Caller(const Options& options, std::initializer_list<void*> results)
      : results_(results),
        host_{[this](Scalar scalar, const Sizes& sizes) {
                return Array{results_.begin()[next_++], scalar, "", sizes,
                             fedlora::contiguous_strides(sizes)};
              },
              options.threads > 0
                  ? options.threads
                  : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))} {}
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;

  operator const Host&() const { return host_; }

 private:
  std::initializer_list<void*> results_;
  size_t next_ = 0;
  Host host_;
};

fedlora::operators::MaxRank limit(int64_t max_rank) {
  return max_rank == kAny ? std::nullopt : std::optional(max_rank);
}

std::string precision(const Options& options) { return options.fast ? "fast" : "exact"; }

void same_modules(const Factors& b, const Factors& a) {
  if (b.modules == a.modules) return;
  throw WrongValue("b and a must have equal numbers of modules, found " +
                   std::to_string(b.modules) + " and " + std::to_string(a.modules));
}

// R, the stacked rank of the B side; 0 where there is no module, which the operators refuse.
int64_t stacked_rank(const Factors& b) {
  int64_t rank = 0;
  const auto modules = static_cast<size_t>(std::max<int64_t>(1, b.modules));
  for (size_t k = 0; k < b.matrices.size() / modules; ++k) rank += b.matrices[k].columns;
  return rank;
}

}  // namespace

namespace operators = fedlora::operators;

void gram(const Factors& x, bool rows, double* gram, const Options& options) {
  const auto results = {static_cast<void*>(gram)};
  operators::gram_list(Caller(options, results), arrays("x", x), x.modules, rows,
                       precision(options));
}

void spectrum(int64_t modules, int64_t rank, const double* gram_b, const double* gram_a,
              const double* scale, double energy, int64_t max_rank, const Spectrum& result,
              const Options& options) {
  const std::initializer_list<void*> results = {result.sigma, result.total_energy, result.left,
                                                result.right, result.info};
  const Sizes square = {modules, rank, rank};
  operators::spectrum(Caller(options, results), array(gram_b, square), array(gram_a, square),
                      array(scale, {modules, rank}), energy, limit(max_rank));
}

void select_rank(int64_t modules, int64_t rank, const double* sigma, const double* total_energy,
                 double energy, int64_t max_rank, int64_t* ranks) {
  const auto results = {static_cast<void*>(ranks)};
  operators::select_rank(Caller({1}, results), array(sigma, {modules, rank}),
                         array(total_energy, {modules}), energy, limit(max_rank));
}

void client_products(int64_t modules, std::span<const int64_t> ranks, const double* gram_b,
                     const double* gram_a, const double* scale, double* products,
                     const Options& options) {
  const auto results = {static_cast<void*>(products)};
  const int64_t rank = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
  const Sizes square = {modules, rank, rank};
  operators::client_products(Caller(options, results), array(gram_b, square), array(gram_a, square),
                             array(scale, {modules, static_cast<int64_t>(ranks.size())}),
                             {ranks.begin(), ranks.end()});
}

void surrogate(int64_t modules, int64_t clients, int64_t rank, const double* gram_b,
               const double* gram_a, const double* weights, const double* scale, int64_t max_sweeps,
               double tol, const Surrogate& result, const Options& options) {
  const std::initializer_list<void*> results = {result.p, result.q, result.objective};
  const Sizes square = {modules, rank, rank};
  operators::surrogate(Caller(options, results), array(gram_b, square), array(gram_a, square),
                       array(weights, {clients}), array(scale, {modules, clients}), max_sweeps,
                       tol);
}

void combine(const Factors& b, const Factors& a, int64_t width, const double* x, const double* y,
             void* b_g, void* a_g, const Options& options) {
  same_modules(b, a);
  const std::initializer_list<void*> results = {b_g, a_g};
  const int64_t rank = stacked_rank(b);
  operators::combine_list(Caller(options, results), arrays("b", b), arrays("a", a),
                          array(x, {b.modules, rank, width}), array(y, {b.modules, width, rank}));
}

void weighted_sum(DType dtype, int64_t modules, int64_t clients, int64_t elements,
                  const void* stacked, const double* weights, void* out, const Options& options) {
  const std::initializer_list<void*> results = {out};
  operators::weighted_sum(Caller(options, results),
                          array(stacked, dtype, {modules, clients, elements}),
                          array(weights, {modules, clients}));
}

void stacked_svd(const Factors& b, const Factors& a, const double* scale, double energy,
                 int64_t max_rank, const Svd& result, const Options& options) {
  same_modules(b, a);
  const std::initializer_list<void*> results = {result.b_g, result.a_g, result.sigma, result.ranks};
  operators::stacked_svd_list(Caller(options, results), arrays("b", b), arrays("a", a),
                              array(scale, {b.modules, stacked_rank(b)}), energy, limit(max_rank),
                              precision(options));
}

void flora_na(const Factors& b, const Factors& a, const double* weights, const double* scale,
              const FloraNa& result, const Options& options) {
  same_modules(b, a);
  const std::initializer_list<void*> results = {result.b_hat, result.a_hat, result.p, result.q,
                                                result.objective};
  const int64_t clients = b.modules < 1 ? 0 : static_cast<int64_t>(b.matrices.size()) / b.modules;
  operators::flora_na_list(Caller(options, results), arrays("b", b), arrays("a", a),
                           array(weights, {clients}), array(scale, {b.modules, clients}),
                           precision(options));
}

}  // namespace flk
