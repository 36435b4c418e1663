// The operators on arrays of either library: checks, result shapes, the loop over modules.
//
// Signatures and meaning are those of the schemas in fedlora_kernels/ops; results come through
// Host::allocate in the schema's order. Any strides are accepted: arrays whose last dimension is
// not contiguous are copied first, all others are read where they lie.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "array.h"

namespace fedlora::operators {

using MaxRank = std::optional<int64_t>;

void gram(const Host& host, const Array& x, bool rows, const std::string& precision);
void gram_list(const Host& host, const Arrays& x, int64_t modules, bool rows,
               const std::string& precision);
void spectrum(const Host& host, const Array& gram_b, const Array& gram_a, const Array& scale,
              double energy, MaxRank max_rank);
void select_rank(const Host& host, const Array& sigma, const Array& total_energy, double energy,
                 MaxRank max_rank);
void client_products(const Host& host, const Array& gram_b, const Array& gram_a, const Array& scale,
                     const std::vector<int64_t>& ranks);
void surrogate(const Host& host, const Array& gram_b, const Array& gram_a, const Array& weights,
               const Array& scale, int64_t max_sweeps, double tol);
void combine(const Host& host, const Array& b, const Array& a, const Array& x, const Array& y);
void combine_list(const Host& host, const Arrays& b, const Arrays& a, const Array& x,
                  const Array& y);
void weighted_sum(const Host& host, const Array& stacked, const Array& weights);
void weighted_sum_list(const Host& host, const Arrays& factors, const Array& weights);
void stacked_svd(const Host& host, const Array& b, const Array& a, const Array& scale,
                 double energy, MaxRank max_rank, const std::string& precision);
void stacked_svd_list(const Host& host, const Arrays& b, const Arrays& a, const Array& scale,
                      double energy, MaxRank max_rank, const std::string& precision);
void flora_na(const Host& host, const Array& b, const Array& a, const Array& weights,
              const Array& scale, const std::string& precision);
void flora_na_list(const Host& host, const Arrays& b, const Arrays& a, const Array& weights,
                   const Array& scale, const std::string& precision);

}  // namespace fedlora::operators
