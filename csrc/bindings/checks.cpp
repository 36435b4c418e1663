#include "checks.h"

#include <array>
#include <charconv>
#include <string_view>

namespace fedlora::checks {
namespace {

using namespace std::string_literals;

constexpr double kFastEnergy = 1 - 1e-6;  // float32 accumulation resolves no more energy than this

std::string at(const std::string& name, size_t index) {
  return name + "[" + std::to_string(index) + "]";
}

std::string both(const std::string& left, const std::string& right) {
  return left + " and " + right;
}

void dimensions(const std::string& name, const Array& array, int64_t count) {
  if (array.dim() == count) return;
  throw WrongValue(name + " must have " + std::to_string(count) + " dimensions, found shape " +
                   shape(array.sizes));
}

void sizes(std::string_view text, const Array& array, const Sizes& expected) {
  if (array.sizes == expected) return;
  const std::string name(text);
  throw WrongValue(name + " must have shape " + shape(expected) + ", found " + shape(array.sizes));
}

void factor(const std::string& name, const Array& array) {
  dimensions(name, array, 3);
  if (is_factor(array.scalar)) return;
  throw WrongType(name + " must be bfloat16, float16, float32 or float64, found " +
                  std::string(array.dtype));
}

void real(const std::string& name, const Array& array) {
  if (array.scalar == Scalar::fp32 || array.scalar == Scalar::fp64) return;
  throw WrongType(name + " must be float32 or float64, found "s + array.dtype);
}

void float64(const std::string& name, const Array& array) {
  if (array.scalar == Scalar::fp64) return;
  throw WrongType(name + " must be float64, found "s + array.dtype);
}

void precision(const std::string& value) {
  if (value == "exact" || value == "fast") return;
  throw WrongValue("precision must be 'exact' or 'fast', found '" + value + "'");
}

void energy(double value) {
  if (value > 0 && value <= 1) return;
  throw WrongValue("energy must lie in (0, 1], found " + number(value));
}

void max_rank(MaxRank value) {
  if (!value || *value >= 1) return;
  throw WrongValue("max_rank must be at least 1, found " + std::to_string(*value));
}

void pair(const Array& b, const Array& a) {
  factor("b", b);
  factor("a", a);
  if (b.size(0) != a.size(0) || b.size(2) != a.size(1)) {
    throw WrongValue("b [L,m,R] and a [L,R,n] must agree in L and R, found " +
                     both(shape(b.sizes), shape(a.sizes)));
  }
  if (b.scalar != a.scalar) {
    throw WrongType("b and a must have one dtype, found " + both(b.dtype, a.dtype));
  }
}

void grams(const Array& gram_b, const Array& gram_a) {
  for (const auto& [name, gram] : {std::pair{"gram_b", &gram_b}, std::pair{"gram_a", &gram_a}}) {
    dimensions(name, *gram, 3);
    float64(name, *gram);
    sizes(name, *gram, {gram->size(0), gram->size(1), gram->size(1)});
  }
  sizes("gram_a", gram_a, gram_b.sizes);
}

void factor_list(const std::string& name, const Arrays& arrays, int64_t modules) {
  const auto count = static_cast<int64_t>(arrays.size());
  if (modules < 1 || count == 0 || count % modules != 0) {
    throw WrongValue(name + " must hold the same number of clients for each of " +
                     std::to_string(modules) + " modules, found " + std::to_string(count) +
                     " tensors");
  }
  const auto clients = static_cast<size_t>(count / modules);
  if (!is_factor(arrays[0].scalar)) {
    throw WrongType(name + " must be bfloat16, float16, float32 or float64, found " +
                    arrays[0].dtype);
  }
  for (size_t i = 0; i < arrays.size(); ++i) {
    const Array& array = arrays[i];
    if (array.dim() != 2) {
      throw WrongValue(at(name, i) + " must be a matrix, found shape " + shape(array.sizes));
    }
    if (array.scalar != arrays[0].scalar) {
      throw WrongType(at(name, i) + " must be " + arrays[0].dtype + ", found " + array.dtype);
    }
    if (array.sizes != arrays[i % clients].sizes) {
      sizes(at(name, i), array, arrays[i % clients].sizes);
    }
  }
}

void list_pair(const Arrays& b, const Arrays& a, int64_t modules) {
  factor_list("b", b, modules);
  factor_list("a", a, modules);
  if (b.size() != a.size()) {
    throw WrongValue("b and a must be equally long, found " +
                     both(std::to_string(b.size()), std::to_string(a.size())) + " tensors");
  }
  if (b[0].scalar != a[0].scalar) {
    throw WrongType("b and a must have one dtype, found " + both(b[0].dtype, a[0].dtype));
  }
  for (size_t i = 0; i < b.size(); ++i) {
    const bool one_update = b[i].size(0) == b[0].size(0) && a[i].size(1) == a[0].size(1);
    if (one_update && b[i].size(1) == a[i].size(0)) continue;
    const std::string found = both(shape(b[i].sizes), shape(a[i].sizes));
    if (!one_update) {
      throw WrongValue(both(at("b", i), at("a", i)) + " must be factors of a " +
                       std::to_string(b[0].size(0)) + " x " + std::to_string(a[0].size(1)) +
                       " update, found " + found);
    }
    throw WrongValue(at("b", i) + " [m,r] and " + at("a", i) + " [r,n] must agree in r, found " +
                     found);
  }
}

void equal_ranks(int64_t stacked_rank, const Array& weights) {
  if (weights.size(0) != 0 && stacked_rank % weights.size(0) == 0) return;
  throw WrongValue("the stacked rank " + std::to_string(stacked_rank) +
                   " must be a multiple of the number of clients, found " +
                   std::to_string(weights.size(0)) +
                   " weights (surrogate averages need equal ranks)");
}

void coefficients(int64_t modules, int64_t rank, const Array& x, const Array& y) {
  dimensions("x", x, 3);
  real("x", x);
  if (y.scalar != x.scalar) {
    throw WrongType("x and y must have one dtype, found " + both(x.dtype, y.dtype));
  }
  sizes("x", x, {modules, rank, x.size(2)});
  sizes("y", y, {modules, x.size(2), rank});
}

void truncation(int64_t modules, int64_t rank, const Array& scale, double energy_share, MaxRank cap,
                const std::string& exactness) {
  real("scale", scale);
  sizes("scale", scale, {modules, rank});
  energy(energy_share);
  max_rank(cap);
  precision(exactness);
  if (exactness == "fast" && energy_share > kFastEnergy) {
    throw WrongValue("precision 'fast' cannot resolve energies above " + number(kFastEnergy) +
                     ", found " + number(energy_share) + "; use 'exact'");
  }
}

void mixing(int64_t modules, const Array& weights, const Array& scale,
            const std::string& exactness) {
  dimensions("weights", weights, 1);
  real("weights", weights);
  real("scale", scale);
  sizes("scale", scale, {modules, weights.size(0)});
  precision(exactness);
}

int64_t stacked_rank(const Arrays& b, int64_t modules) {
  int64_t rank = 0;
  for (size_t k = 0; k < b.size() / static_cast<size_t>(modules); ++k) rank += b[k].size(1);
  return rank;
}

}  // namespace

std::string shape(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

std::string number(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  std::string result(text.data(), end);
  return result.find_first_not_of("-0123456789") == std::string::npos ? result + ".0" : result;
}

bool is_factor(Scalar scalar) { return scalar != Scalar::int64 && scalar != Scalar::other; }

void gram(const Array& x, const std::string& exactness) {
  factor("x", x);
  precision(exactness);
}

void gram_list(const Arrays& x, int64_t modules, bool rows, const std::string& exactness) {
  factor_list("x", x, modules);
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i].size(rows ? 1 : 0) == x[0].size(rows ? 1 : 0)) continue;
    throw WrongValue(at("x", i) + " and x[0] must agree in d, found " +
                     both(shape(x[i].sizes), shape(x[0].sizes)));
  }
  precision(exactness);
}

void spectrum(const Array& gram_b, const Array& gram_a, const Array& scale, double energy_share,
              MaxRank cap) {
  grams(gram_b, gram_a);
  real("scale", scale);
  sizes("scale", scale, {gram_b.size(0), gram_b.size(1)});
  energy(energy_share);
  max_rank(cap);
}

void select_rank(const Array& sigma, const Array& total_energy, double energy_share, MaxRank cap) {
  dimensions("sigma", sigma, 2);
  float64("sigma", sigma);
  float64("total_energy", total_energy);
  sizes("total_energy", total_energy, {sigma.size(0)});
  energy(energy_share);
  max_rank(cap);
}

void client_products(const Array& gram_b, const Array& gram_a, const Array& scale,
                     const std::vector<int64_t>& ranks) {
  grams(gram_b, gram_a);
  real("scale", scale);
  sizes("scale", scale, {gram_b.size(0), static_cast<int64_t>(ranks.size())});
  int64_t sum = 0;
  for (size_t client = 0; client < ranks.size(); ++client) {
    if (ranks[client] < 0) {
      throw WrongValue(at("ranks", client) + " must not be negative, found " +
                       std::to_string(ranks[client]));
    }
    sum += ranks[client];
  }
  if (sum != gram_b.size(1)) {
    throw WrongValue("ranks must sum to the stacked rank " + std::to_string(gram_b.size(1)) +
                     ", found " + std::to_string(sum));
  }
}

void surrogate(const Array& gram_b, const Array& gram_a, const Array& weights, const Array& scale,
               int64_t max_sweeps, double tol) {
  grams(gram_b, gram_a);
  dimensions("weights", weights, 1);
  real("weights", weights);
  real("scale", scale);
  sizes("scale", scale, {gram_b.size(0), weights.size(0)});
  equal_ranks(gram_b.size(1), weights);
  if (max_sweeps < 1) {
    throw WrongValue("max_sweeps must be at least 1, found " + std::to_string(max_sweeps));
  }
  if (!(tol >= 0)) throw WrongValue("tol must not be negative, found " + number(tol));
}

void combine(const Array& b, const Array& a, const Array& x, const Array& y) {
  pair(b, a);
  coefficients(b.size(0), b.size(2), x, y);
}

void combine_list(const Arrays& b, const Arrays& a, const Array& x, const Array& y) {
  dimensions("x", x, 3);
  list_pair(b, a, x.size(0));
  coefficients(x.size(0), stacked_rank(b, x.size(0)), x, y);
}

void stacked_svd(const Array& b, const Array& a, const Array& scale, double energy_share,
                 MaxRank cap, const std::string& exactness) {
  pair(b, a);
  truncation(b.size(0), b.size(2), scale, energy_share, cap, exactness);
}

void stacked_svd_list(const Arrays& b, const Arrays& a, const Array& scale, double energy_share,
                      MaxRank cap, const std::string& exactness) {
  dimensions("scale", scale, 2);
  real("scale", scale);
  list_pair(b, a, scale.size(0));
  truncation(scale.size(0), stacked_rank(b, scale.size(0)), scale, energy_share, cap, exactness);
}

void flora_na(const Array& b, const Array& a, const Array& weights, const Array& scale,
              const std::string& exactness) {
  pair(b, a);
  mixing(b.size(0), weights, scale, exactness);
  equal_ranks(b.size(2), weights);
}

void flora_na_list(const Arrays& b, const Arrays& a, const Array& weights, const Array& scale,
                   const std::string& exactness) {
  dimensions("scale", scale, 2);
  list_pair(b, a, scale.size(0));
  mixing(scale.size(0), weights, scale, exactness);
  if (static_cast<int64_t>(b.size()) != scale.size(0) * scale.size(1)) {
    throw WrongValue("b and a must hold one tensor for each of the scalings " + shape(scale.sizes) +
                     ", found " + std::to_string(b.size()));
  }
  for (size_t i = 0; i < b.size(); ++i) {
    if (b[i].sizes != b[0].sizes) sizes(at("b", i), b[i], b[0].sizes);
  }
}

void weighted_sum(const Array& stacked, const Array& weights) {
  if (stacked.dim() < 2) {
    throw WrongValue("stacked must be [L,K,...], found shape " + shape(stacked.sizes));
  }
  if (!is_factor(stacked.scalar)) {
    throw WrongType("stacked must be a floating type, found "s + stacked.dtype);
  }
  real("weights", weights);
  const int64_t modules = stacked.size(0);
  const int64_t clients = stacked.size(1);
  sizes("weights", weights, weights.dim() == 2 ? Sizes{modules, clients} : Sizes{clients});
}

void weighted_sum_list(const Arrays& factors, const Array& weights) {
  dimensions("weights", weights, 2);
  real("weights", weights);
  const auto count = static_cast<int64_t>(factors.size());
  if (count == 0 || count != weights.size(0) * weights.size(1)) {
    throw WrongValue("factors must hold one tensor for each of the weights " +
                     shape(weights.sizes) + ", found " + std::to_string(count));
  }
  for (size_t i = 0; i < factors.size(); ++i) {
    if (factors[i].sizes != factors[0].sizes) {
      sizes(at("factors", i), factors[i], factors[0].sizes);
    }
    if (factors[i].scalar != factors[0].scalar || !is_factor(factors[i].scalar)) {
      throw WrongType(at("factors", i) + " must be " + factors[0].dtype +
                      " (a floating type), found "s + factors[i].dtype);
    }
  }
}

}  // namespace fedlora::checks
