// The operators on arrays in device memory: the same checks, then kernels on the caller's stream.
#include <algorithm>

#include "checks.h"
#include "cuda/client_products.h"
#include "cuda/combine.h"
#include "cuda/flora_na.h"
#include "cuda/gram/gram.h"
#include "cuda/rank.h"
#include "cuda/spectrum/spectrum.h"
#include "cuda/stacked_svd.h"
#include "cuda/surrogate/surrogate.h"
#include "cuda/weighted_sum.h"
#include "cuda_views.h"
#include "operators.h"

namespace fedlora::operators {
namespace {

using cuda::doubles;
using cuda::side;
using cuda::sources;
using cuda::stream_of;

constexpr SurrogateOptions kSurrogate = {50, 1e-12};

double* new_doubles(const Host& host, const Sizes& sizes) {
  return static_cast<double*>(host.allocate(Scalar::fp64, sizes).data);
}

int64_t* new_integers(const Host& host, const Sizes& sizes) {
  return static_cast<int64_t*>(host.allocate(Scalar::int64, sizes).data);
}

void* scratch(const Host& host, size_t bytes) {
  return bytes == 0 ? nullptr : host.device->scratch(bytes);
}

void grams_of(const Host& host, const cuda::Factors& x, const std::string& precision) {
  const bool fast = precision == "fast";
  double* out = new_doubles(host, {x.modules, x.rank, x.rank});
  cuda::gram(x, fast, out, scratch(host, cuda::gram_workspace(x, fast)), stream_of(host));
}

void combined(const Host& host, const cuda::Factors& b, const cuda::Factors& a, Scalar scalar,
              const Array& x, const Array& y) {
  const int64_t width = x.size(2);
  const int64_t each = b.rank * width;
  void* b_g = host.allocate(scalar, {b.modules, b.depth, width}).data;
  void* a_g = host.allocate(scalar, {b.modules, width, a.depth}).data;
  const cuda::Coefficients left = {doubles(host, x), each, width, 1, width, nullptr};
  const cuda::Coefficients right = {doubles(host, y), each, 1, b.rank, width, nullptr};
  cuda::combine(b, left, width, b_g, stream_of(host));
  cuda::combine(a, right, width, a_g, stream_of(host));
}

void svds_of(const Host& host, const cuda::Factors& b, const cuda::Factors& a, Scalar scalar,
             const Array& scale, double energy, MaxRank max_rank, const std::string& precision) {
  const int64_t width = max_rank.value_or(std::min({b.rank, b.depth, a.depth}));
  const cuda::SvdOptions options = {energy, width, precision == "fast"};
  void* b_g = host.allocate(scalar, {b.modules, b.depth, width}).data;
  void* a_g = host.allocate(scalar, {b.modules, width, a.depth}).data;
  double* sigma = new_doubles(host, {b.modules, b.rank});
  int64_t* ranks = new_integers(host, {b.modules});
  cuda::stacked_svd(b, a, doubles(host, scale), options, {b_g, a_g, sigma, ranks},
                    scratch(host, cuda::stacked_svd_workspace(b, a, options, stream_of(host))),
                    stream_of(host));
}

void flora_na_of(const Host& host, const cuda::Factors& b, const cuda::Factors& a, Scalar scalar,
                 const Array& weights, const Array& scale, const std::string& precision) {
  const int64_t clients = weights.size(0);
  const int64_t rank = b.rank / clients;
  const bool fast = precision == "fast";
  void* b_hat = host.allocate(scalar, {b.modules, b.depth, rank}).data;
  void* a_hat = host.allocate(scalar, {b.modules, rank, a.depth}).data;
  double* p = new_doubles(host, {b.modules, clients});
  double* q = new_doubles(host, {b.modules, clients});
  double* objective = new_doubles(host, {b.modules, kSurrogate.max_sweeps + 1});
  cuda::flora_na(b, a, clients, doubles(host, weights), doubles(host, scale), fast, kSurrogate,
                 {b_hat, a_hat, p, q, objective},
                 scratch(host, cuda::flora_na_workspace(b, a, clients, fast, kSurrogate)),
                 stream_of(host));
}

}  // namespace

void gram(const Host& host, const Array& x, bool rows, const std::string& precision) {
  checks::gram(x, precision);
  grams_of(host, side(host, x, rows), precision);
}

void gram_list(const Host& host, const Arrays& x, int64_t modules, bool rows,
               const std::string& precision) {
  checks::gram_list(x, modules, rows, precision);
  grams_of(host, side(host, x, modules, rows), precision);
}

void spectrum(const Host& host, const Array& gram_b, const Array& gram_a, const Array& scale,
              double energy, MaxRank max_rank) {
  checks::spectrum(gram_b, gram_a, scale, energy, max_rank);
  const int64_t modules = gram_b.size(0);
  const int64_t rank = gram_b.size(1);
  double* sigma = new_doubles(host, {modules, rank});
  double* total_energy = new_doubles(host, {modules});
  double* left = new_doubles(host, {modules, rank, rank});
  double* right = new_doubles(host, {modules, rank, rank});
  int64_t* info = new_integers(host, {modules});
  cuda::spectrum(modules, rank, doubles(host, gram_b), doubles(host, gram_a), doubles(host, scale),
                 {energy, max_rank.value_or(0), 0}, {sigma, total_energy, left, right, info},
                 scratch(host, cuda::spectrum_workspace(modules, rank, stream_of(host))),
                 stream_of(host));
}

void select_rank(const Host& host, const Array& sigma, const Array& total_energy, double energy,
                 MaxRank max_rank) {
  checks::select_rank(sigma, total_energy, energy, max_rank);
  const int64_t modules = sigma.size(0);
  const int64_t rank = sigma.size(1);
  int64_t* ranks = new_integers(host, {modules});
  cuda::select_rank(modules, rank, doubles(host, sigma), doubles(host, total_energy), energy,
                    max_rank.value_or(rank), ranks, stream_of(host));
}

void client_products(const Host& host, const Array& gram_b, const Array& gram_a, const Array& scale,
                     const std::vector<int64_t>& ranks) {
  checks::client_products(gram_b, gram_a, scale, ranks);
  const int64_t modules = gram_b.size(0);
  const auto clients = static_cast<int64_t>(ranks.size());
  double* products = new_doubles(host, {modules, clients, clients});
  cuda::client_products(modules, ranks, doubles(host, gram_b), doubles(host, gram_a),
                        doubles(host, scale), products, stream_of(host));
}

void surrogate(const Host& host, const Array& gram_b, const Array& gram_a, const Array& weights,
               const Array& scale, int64_t max_sweeps, double tol) {
  checks::surrogate(gram_b, gram_a, weights, scale, max_sweeps, tol);
  const int64_t modules = gram_b.size(0);
  const int64_t clients = weights.size(0);
  const int64_t rank = gram_b.size(1) / clients;
  double* p = new_doubles(host, {modules, clients});
  double* q = new_doubles(host, {modules, clients});
  double* objective = new_doubles(host, {modules, max_sweeps + 1});
  cuda::surrogate(modules, clients, rank, doubles(host, gram_b), doubles(host, gram_a),
                  doubles(host, weights), doubles(host, scale), {max_sweeps, tol}, p, q, objective,
                  scratch(host, cuda::surrogate_workspace(modules, clients, rank, max_sweeps)),
                  stream_of(host));
}

void combine(const Host& host, const Array& b, const Array& a, const Array& x, const Array& y) {
  checks::combine(b, a, x, y);
  combined(host, side(host, b, false), side(host, a, true), b.scalar, x, y);
}

void combine_list(const Host& host, const Arrays& b, const Arrays& a, const Array& x,
                  const Array& y) {
  checks::combine_list(b, a, x, y);
  const int64_t modules = x.size(0);
  combined(host, side(host, b, modules, false), side(host, a, modules, true), b[0].scalar, x, y);
}

void stacked_svd(const Host& host, const Array& b, const Array& a, const Array& scale,
                 double energy, MaxRank max_rank, const std::string& precision) {
  checks::stacked_svd(b, a, scale, energy, max_rank, precision);
  svds_of(host, side(host, b, false), side(host, a, true), b.scalar, scale, energy, max_rank,
          precision);
}

void stacked_svd_list(const Host& host, const Arrays& b, const Arrays& a, const Array& scale,
                      double energy, MaxRank max_rank, const std::string& precision) {
  checks::stacked_svd_list(b, a, scale, energy, max_rank, precision);
  const int64_t modules = scale.size(0);
  svds_of(host, side(host, b, modules, false), side(host, a, modules, true), b[0].scalar, scale,
          energy, max_rank, precision);
}

void flora_na(const Host& host, const Array& b, const Array& a, const Array& weights,
              const Array& scale, const std::string& precision) {
  checks::flora_na(b, a, weights, scale, precision);
  flora_na_of(host, side(host, b, false), side(host, a, true), b.scalar, weights, scale, precision);
}

void flora_na_list(const Host& host, const Arrays& b, const Arrays& a, const Array& weights,
                   const Array& scale, const std::string& precision) {
  checks::flora_na_list(b, a, weights, scale, precision);
  const int64_t modules = scale.size(0);
  flora_na_of(host, side(host, b, modules, false), side(host, a, modules, true), b[0].scalar,
              weights, scale, precision);
}

void weighted_sum(const Host& host, const Array& stacked, const Array& weights) {
  checks::weighted_sum(stacked, weights);
  Sizes sizes = {stacked.size(0)};
  for (int64_t axis = 2; axis < stacked.dim(); ++axis) sizes.push_back(stacked.size(axis));
  void* out = host.allocate(stacked.scalar, sizes).data;
  const int64_t each = weights.dim() == 2 ? weights.size(1) : 0;
  cuda::weighted_sum(sources(host, stacked), {doubles(host, weights), each}, out, stream_of(host));
}

void weighted_sum_list(const Host& host, const Arrays& factors, const Array& weights) {
  checks::weighted_sum_list(factors, weights);
  Sizes sizes = {weights.size(0)};
  for (const int64_t size : factors[0].sizes) sizes.push_back(size);
  void* out = host.allocate(factors[0].scalar, sizes).data;
  cuda::weighted_sum(sources(host, factors, weights.size(0)),
                     {doubles(host, weights), weights.size(1)}, out, stream_of(host));
}

}  // namespace fedlora::operators
