// The checks of fedlora_kernels/ops/checks.py with the same sentences, for both bindings.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "array.h"

namespace fedlora::checks {

using MaxRank = std::optional<int64_t>;

std::string shape(const Sizes& sizes);
std::string number(double value);  // as Python prints it

bool is_factor(Scalar scalar);

// One function per operator: everything that fedlora_kernels/ops refuses.
void gram(const Array& x, const std::string& precision);
void gram_list(const Arrays& x, int64_t modules, bool rows, const std::string& precision);
void spectrum(const Array& gram_b, const Array& gram_a, const Array& scale, double energy,
              MaxRank max_rank);
void select_rank(const Array& sigma, const Array& total_energy, double energy, MaxRank max_rank);
void client_products(const Array& gram_b, const Array& gram_a, const Array& scale,
                     const std::vector<int64_t>& ranks);
void surrogate(const Array& gram_b, const Array& gram_a, const Array& weights, const Array& scale,
               int64_t max_sweeps, double tol);
void combine(const Array& b, const Array& a, const Array& x, const Array& y);
void combine_list(const Arrays& b, const Arrays& a, const Array& x, const Array& y);
void stacked_svd(const Array& b, const Array& a, const Array& scale, double energy,
                 MaxRank max_rank, const std::string& precision);
void stacked_svd_list(const Arrays& b, const Arrays& a, const Array& scale, double energy,
                      MaxRank max_rank, const std::string& precision);
void flora_na(const Array& b, const Array& a, const Array& weights, const Array& scale,
              const std::string& precision);
void flora_na_list(const Arrays& b, const Arrays& a, const Array& weights, const Array& scale,
                   const std::string& precision);
void weighted_sum(const Array& stacked, const Array& weights);
void weighted_sum_list(const Arrays& factors, const Array& weights);

}  // namespace fedlora::checks
