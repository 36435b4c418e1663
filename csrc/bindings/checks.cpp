#include "checks.h"

#include <array>
#include <charconv>

namespace fedlora::checks {
namespace {

std::string at(const std::string& name, size_t index) {
  return name + "[" + std::to_string(index) + "]";
}

std::string both(const std::string& left, const std::string& right) {
  return left + " and " + right;
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

void dimensions(const std::string& name, const Array& array, int64_t count) {
  if (array.dim() == count) return;
  throw WrongValue(name + " must have " + std::to_string(count) + " dimensions, found shape " +
                   shape(array.sizes));
}

void sizes(const std::string& name, const Array& array, const Sizes& expected) {
  if (array.sizes == expected) return;
  throw WrongValue(name + " must have shape " + shape(expected) + ", found " + shape(array.sizes));
}

void factor(const std::string& name, const Array& array) {
  dimensions(name, array, 3);
  if (is_factor(array.scalar)) return;
  throw WrongType(name + " must be bfloat16, float16, float32 or float64, found " + array.dtype);
}

void real(const std::string& name, const Array& array) {
  if (array.scalar == Scalar::fp32 || array.scalar == Scalar::fp64) return;
  throw WrongType(name + " must be float32 or float64, found " + array.dtype);
}

void float64(const std::string& name, const Array& array) {
  if (array.scalar == Scalar::fp64) return;
  throw WrongType(name + " must be float64, found " + array.dtype);
}

void precision(const std::string& value) {
  if (value == "exact" || value == "fast") return;
  throw WrongValue("precision must be 'exact' or 'fast', found '" + value + "'");
}

void energy(double value) {
  if (value > 0 && value <= 1) return;
  throw WrongValue("energy must lie in (0, 1], found " + number(value));
}

void max_rank(std::optional<int64_t> value) {
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
    if (array.dtype != arrays[0].dtype) {
      throw WrongType(at(name, i) + " must be " + arrays[0].dtype + ", found " + array.dtype);
    }
    sizes(at(name, i), array, arrays[i % clients].sizes);
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
    const std::string names = both(at("b", i), at("a", i));
    const std::string found = both(shape(b[i].sizes), shape(a[i].sizes));
    if (b[i].size(0) != b[0].size(0) || a[i].size(1) != a[0].size(1)) {
      throw WrongValue(names + " must be factors of a " + std::to_string(b[0].size(0)) + " x " +
                       std::to_string(a[0].size(1)) + " update, found " + found);
    }
    if (b[i].size(1) != a[i].size(0)) {
      throw WrongValue(at("b", i) + " [m,r] and " + at("a", i) + " [r,n] must agree in r, found " +
                       found);
    }
  }
}

void equal_ranks(int64_t stacked_rank, const Array& weights) {
  if (weights.size(0) != 0 && stacked_rank % weights.size(0) == 0) return;
  throw WrongValue("the stacked rank " + std::to_string(stacked_rank) +
                   " must be a multiple of the number of clients, found " +
                   std::to_string(weights.size(0)) +
                   " weights (surrogate averages need equal ranks)");
}

}  // namespace fedlora::checks
