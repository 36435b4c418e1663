#include "operators.h"

#include <algorithm>
#include <limits>

#include "checks.h"
#include "core/client_products.h"
#include "core/combine.h"
#include "core/flora_na.h"
#include "core/gram.h"
#include "core/parallel.h"
#include "core/rank.h"
#include "core/spectrum.h"
#include "core/stacked_svd.h"
#include "core/surrogate.h"
#include "core/weighted_sum.h"
#include "views.h"

namespace fedlora::operators {
namespace {

constexpr SurrogateOptions kSurrogate = {50, 1e-12};

double* doubles(const Array& array) { return static_cast<double*>(array.data); }
int64_t* integers(const Array& array) { return static_cast<int64_t*>(array.data); }

// Module `module` of a contiguous result [L, ...].
void* module_of(const Array& array, int64_t module) {
  int64_t elements = 1;
  for (int64_t axis = 1; axis < array.dim(); ++axis) elements *= array.size(axis);
  const int64_t bytes = bytes_of(factor_type(array.scalar));
  return static_cast<char*>(array.data) + module * elements * bytes;
}

std::runtime_error in_module(int64_t module, const std::exception& error) {
  return std::runtime_error("module " + std::to_string(module) + ": " + error.what());
}

void grams_of(const Host& host, const Side& x, const std::string& precision) {
  const int64_t rank = x.rank();
  double* out = doubles(host.allocate(Scalar::fp64, {x.modules(), rank, rank}));
  if (x.modules() == 0) return;
  over_modules(x.modules(), gram_nanoseconds(x[0]), host.threads, [&](int64_t module, int threads) {
    fedlora::gram(x[module], precision == "fast", threads, out + module * rank * rank);
  });
}

void combined(const Host& host, const Side& b, const Side& a, const Array& x, const Array& y) {
  const int64_t modules = b.modules();
  const int64_t rank = b.rank();
  const int64_t width = x.size(2);
  const bool single = x.scalar == Scalar::fp32;
  const Doubles left(x);
  const Doubles right(y);
  const Array b_g = host.allocate(b.scalar(), {modules, b.depth(), width});
  const Array a_g = host.allocate(b.scalar(), {modules, width, a.depth()});
  if (modules == 0) return;
  const double nanoseconds = combine_nanoseconds(b[0], width) + combine_nanoseconds(a[0], width);
  over_modules(modules, nanoseconds, host.threads, [&](int64_t module, int threads) {
    const int64_t offset = module * rank * width;
    const Coefficients coefficients = {left.get() + offset, right.get() + offset, width, width};
    fedlora::combine(b[module], a[module], coefficients, single, threads, module_of(b_g, module),
                     module_of(a_g, module));
  });
}

void svds_of(const Host& host, const Side& b, const Side& a, const Array& scale, double energy,
             MaxRank max_rank, const std::string& precision) {
  const int64_t modules = b.modules();
  const int64_t rank = b.rank();
  const int64_t width = max_rank.value_or(std::min({rank, b.depth(), a.depth()}));
  const Doubles weights(scale);
  const Array b_g = host.allocate(b.scalar(), {modules, b.depth(), width});
  const Array a_g = host.allocate(b.scalar(), {modules, width, a.depth()});
  double* sigma = doubles(host.allocate(Scalar::fp64, {modules, rank}));
  int64_t* ranks = integers(host.allocate(Scalar::int64, {modules}));
  if (modules == 0) return;
  const double nanoseconds = stacked_svd_nanoseconds(b[0], a[0]);
  over_modules(modules, nanoseconds, host.threads, [&](int64_t module, int threads) {
    const SvdResult result = {module_of(b_g, module), module_of(a_g, module), sigma + module * rank,
                              ranks + module};
    try {
      fedlora::stacked_svd(b[module], a[module], weights.get() + module * rank,
                           {energy, width, precision == "fast"}, threads, result);
    } catch (const std::runtime_error& error) {
      throw in_module(module, error);
    }
  });
}

void flora_na_of(const Host& host, const Side& b, const Side& a, const Array& weights,
                 const Array& scale, const std::string& precision) {
  const int64_t modules = b.modules();
  const int64_t clients = weights.size(0);
  const int64_t rank = b.rank() / clients;
  const Doubles shares(weights);
  const Doubles scalings(scale);
  const Array b_hat = host.allocate(b.scalar(), {modules, b.depth(), rank});
  const Array a_hat = host.allocate(b.scalar(), {modules, rank, a.depth()});
  double* p = doubles(host.allocate(Scalar::fp64, {modules, clients}));
  double* q = doubles(host.allocate(Scalar::fp64, {modules, clients}));
  const int64_t steps = kSurrogate.max_sweeps + 1;
  double* objective = doubles(host.allocate(Scalar::fp64, {modules, steps}));
  if (modules == 0) return;
  const double nanoseconds = gram_nanoseconds(b[0]) + gram_nanoseconds(a[0]);
  over_modules(modules, nanoseconds, host.threads, [&](int64_t module, int threads) {
    const FloraNaResult result = {module_of(b_hat, module), module_of(a_hat, module),
                                  p + module * clients, q + module * clients,
                                  objective + module * steps};
    fedlora::flora_na(b[module], a[module], clients, shares.get(),
                      scalings.get() + module * clients, precision == "fast", kSurrogate, threads,
                      result);
  });
}

// sources[l * K + k], one layout; weights [L, K].
void averages_of(const Host& host, const std::vector<const void*>& sources, const Layout& layout,
                 const std::vector<int64_t>& strides, const double* weights, const Array& out) {
  const int64_t modules = out.size(0);
  if (modules == 0) return;
  const int64_t clients = static_cast<int64_t>(sources.size()) / modules;
  const DType dtype = factor_type(out.scalar);
  const auto runs_of = [&](int64_t module) -> Runs {
    const int64_t start = module * clients;
    return {sources.data() + start, strides.data() + start, clients, layout.rows, layout.columns};
  };
  over_modules(modules, weighted_sum_nanoseconds(dtype, runs_of(0)), host.threads,
               [&](int64_t module, int threads) {
                 fedlora::weighted_sum(dtype, runs_of(module), weights + module * clients, threads,
                                       module_of(out, module));
               });
}

}  // namespace

void gram(const Host& host, const Array& x, bool rows, const std::string& precision) {
  checks::gram(x, precision);
  grams_of(host, Side(x, rows), precision);
}

void gram_list(const Host& host, const Arrays& x, int64_t modules, bool rows,
               const std::string& precision) {
  checks::gram_list(x, modules, rows, precision);
  grams_of(host, Side(x, modules, rows), precision);
}

void spectrum(const Host& host, const Array& gram_b, const Array& gram_a, const Array& scale,
              double energy, MaxRank max_rank) {
  checks::spectrum(gram_b, gram_a, scale, energy, max_rank);
  const int64_t modules = gram_b.size(0);
  const int64_t rank = gram_b.size(1);
  const int64_t square = rank * rank;
  const Doubles grams_b(gram_b);
  const Doubles grams_a(gram_a);
  const Doubles scales(scale);
  double* sigma = doubles(host.allocate(Scalar::fp64, {modules, rank}));
  double* total_energy = doubles(host.allocate(Scalar::fp64, {modules}));
  double* left = doubles(host.allocate(Scalar::fp64, {modules, rank, rank}));
  double* right = doubles(host.allocate(Scalar::fp64, {modules, rank, rank}));
  int64_t* info = integers(host.allocate(Scalar::int64, {modules}));
  over_modules(modules, spectrum_nanoseconds(rank), host.threads, [&](int64_t module, int) {
    const Spectrum found(rank, grams_b.get() + module * square, grams_a.get() + module * square,
                         scales.get() + module * rank, 0, energy, max_rank.value_or(rank));
    const int64_t count = found.converged() ? found.count() : 0;
    double* x = left + module * square;
    double* y = right + module * square;
    const Buffer<double> columns(rank * count);
    found.left(count, columns.get());
    std::fill_n(x, square, 0.0);
    for (int64_t i = 0; i < rank; ++i) {
      std::copy_n(columns.get() + i * count, count, x + i * rank);
    }
    std::fill_n(y, square, 0.0);
    found.right(count, y);
    std::copy_n(found.sigma(), rank, sigma + module * rank);
    total_energy[module] = found.total_energy();
    info[module] = found.converged() ? 0 : 1;
  });
}

void select_rank(const Host& host, const Array& sigma, const Array& total_energy, double energy,
                 MaxRank max_rank) {
  checks::select_rank(sigma, total_energy, energy, max_rank);
  const int64_t rank = sigma.size(1);
  const Doubles values(sigma);
  const Doubles totals(total_energy);
  int64_t* ranks = integers(host.allocate(Scalar::int64, {sigma.size(0)}));
  for (int64_t module = 0; module < sigma.size(0); ++module) {
    ranks[module] = fedlora::select_rank(values.get() + module * rank, rank, totals.get()[module],
                                         energy, max_rank.value_or(rank));
  }
}

void client_products(const Host& host, const Array& gram_b, const Array& gram_a, const Array& scale,
                     const std::vector<int64_t>& ranks) {
  checks::client_products(gram_b, gram_a, scale, ranks);
  const int64_t modules = gram_b.size(0);
  const int64_t rank = gram_b.size(1);
  const auto clients = static_cast<int64_t>(ranks.size());
  const Doubles grams_b(gram_b);
  const Doubles grams_a(gram_a);
  const Doubles scalings(scale);
  double* products = doubles(host.allocate(Scalar::fp64, {modules, clients, clients}));
  over_modules(
      modules, client_products_nanoseconds(rank), host.threads, [&](int64_t module, int threads) {
        fedlora::client_products(
            ranks, grams_b.get() + module * rank * rank, grams_a.get() + module * rank * rank,
            scalings.get() + module * clients, threads, products + module * clients * clients);
      });
}

void surrogate(const Host& host, const Array& gram_b, const Array& gram_a, const Array& weights,
               const Array& scale, int64_t max_sweeps, double tol) {
  checks::surrogate(gram_b, gram_a, weights, scale, max_sweeps, tol);
  const int64_t modules = gram_b.size(0);
  const int64_t clients = weights.size(0);
  const int64_t rank = gram_b.size(1);
  const int64_t square = rank * rank;
  const Doubles grams_b(gram_b);
  const Doubles grams_a(gram_a);
  const Doubles shares(weights);
  const Doubles scalings(scale);
  double* p = doubles(host.allocate(Scalar::fp64, {modules, clients}));
  double* q = doubles(host.allocate(Scalar::fp64, {modules, clients}));
  double* objective = doubles(host.allocate(Scalar::fp64, {modules, max_sweeps + 1}));
  parallel_for(modules, host.threads, [&](int64_t module) {
    fedlora::surrogate(clients, rank / clients, grams_b.get() + module * square,
                       grams_a.get() + module * square, shares.get(),
                       scalings.get() + module * clients, {max_sweeps, tol}, p + module * clients,
                       q + module * clients, objective + module * (max_sweeps + 1));
  });
}

void combine(const Host& host, const Array& b, const Array& a, const Array& x, const Array& y) {
  checks::combine(b, a, x, y);
  combined(host, Side(b, false), Side(a, true), x, y);
}

void combine_list(const Host& host, const Arrays& b, const Arrays& a, const Array& x,
                  const Array& y) {
  checks::combine_list(b, a, x, y);
  combined(host, Side(b, x.size(0), false), Side(a, x.size(0), true), x, y);
}

void stacked_svd(const Host& host, const Array& b, const Array& a, const Array& scale,
                 double energy, MaxRank max_rank, const std::string& precision) {
  checks::stacked_svd(b, a, scale, energy, max_rank, precision);
  svds_of(host, Side(b, false), Side(a, true), scale, energy, max_rank, precision);
}

void stacked_svd_list(const Host& host, const Arrays& b, const Arrays& a, const Array& scale,
                      double energy, MaxRank max_rank, const std::string& precision) {
  checks::stacked_svd_list(b, a, scale, energy, max_rank, precision);
  const int64_t modules = scale.size(0);
  svds_of(host, Side(b, modules, false), Side(a, modules, true), scale, energy, max_rank,
          precision);
}

void flora_na(const Host& host, const Array& b, const Array& a, const Array& weights,
              const Array& scale, const std::string& precision) {
  checks::flora_na(b, a, weights, scale, precision);
  flora_na_of(host, Side(b, false), Side(a, true), weights, scale, precision);
}

void flora_na_list(const Host& host, const Arrays& b, const Arrays& a, const Array& weights,
                   const Array& scale, const std::string& precision) {
  checks::flora_na_list(b, a, weights, scale, precision);
  const int64_t modules = scale.size(0);
  flora_na_of(host, Side(b, modules, false), Side(a, modules, true), weights, scale, precision);
}

void weighted_sum(const Host& host, const Array& stacked, const Array& weights) {
  checks::weighted_sum(stacked, weights);
  const int64_t modules = stacked.size(0);
  const int64_t clients = stacked.size(1);
  const bool own = weights.dim() == 2;

  const Rows view(stacked, !layout_of(stacked, 2).possible);
  const Layout layout = layout_of(view.array(), 2);
  const Doubles values(weights);
  std::vector<double> all;
  std::vector<const void*> sources;
  for (int64_t module = 0; module < modules; ++module) {
    const double* from = values.get() + (own ? module * clients : 0);
    all.insert(all.end(), from, from + clients);
    for (int64_t k = 0; k < clients; ++k) {
      const int64_t offset = module * view.array().stride(0) + k * view.array().stride(1);
      sources.push_back(static_cast<const char*>(view.array().data) +
                        offset * bytes_of(factor_type(stacked.scalar)));
    }
  }
  Sizes sizes = {stacked.size(0)};
  for (int64_t axis = 2; axis < stacked.dim(); ++axis) sizes.push_back(stacked.size(axis));
  const std::vector<int64_t> strides(sources.size(), layout.stride);
  averages_of(host, sources, layout, strides, all.data(), host.allocate(stacked.scalar, sizes));
}

void weighted_sum_list(const Host& host, const Arrays& factors, const Array& weights) {
  checks::weighted_sum_list(factors, weights);
  // One common layout: rows of runs where every factor has them with the same columns.
  Layout layout = layout_of(factors[0], 0);
  bool whole = false;
  for (const Array& factor : factors) {
    const Layout own = layout_of(factor, 0);
    whole |= !own.possible || own.rows != layout.rows || own.columns != layout.columns;
  }
  std::vector<Rows> views;
  std::vector<const void*> sources;
  std::vector<int64_t> strides;
  views.reserve(factors.size());
  sources.reserve(factors.size());
  strides.reserve(factors.size());
  for (const Array& factor : factors) {
    const Array& view = views.emplace_back(factor, whole).array();
    sources.push_back(view.data);
    strides.push_back(layout_of(view, 0).stride);
  }
  layout = layout_of(views[0].array(), 0);
  Sizes sizes = {weights.size(0)};
  for (const int64_t size : factors[0].sizes) sizes.push_back(size);
  const Doubles values(weights);
  averages_of(host, sources, layout, strides, values.get(),
              host.allocate(factors[0].scalar, sizes));
}

}  // namespace fedlora::operators
