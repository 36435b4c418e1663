// The checks of fedlora_kernels/ops/checks.py with the same sentences, for both bindings.
#pragma once

#include <optional>
#include <string>

#include "array.h"

namespace fedlora::checks {

std::string shape(const Sizes& sizes);
std::string number(double value);  // as Python prints it

void dimensions(const std::string& name, const Array& array, int64_t count);
void sizes(const std::string& name, const Array& array, const Sizes& expected);
void factor(const std::string& name, const Array& array);
void real(const std::string& name, const Array& array);
void float64(const std::string& name, const Array& array);

void precision(const std::string& value);
void energy(double value);
void max_rank(std::optional<int64_t> value);

void pair(const Array& b, const Array& a);
void grams(const Array& gram_b, const Array& gram_a);
void factor_list(const std::string& name, const Arrays& arrays, int64_t modules);
void list_pair(const Arrays& b, const Arrays& a, int64_t modules);
void equal_ranks(int64_t stacked_rank, const Array& weights);

bool is_factor(Scalar scalar);

}  // namespace fedlora::checks
