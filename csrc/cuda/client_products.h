// client_products: s_j s_k sum(G_B^{jk} * G_A^{jk}) for every pair of clients and every module.
#pragma once

#include <cstdint>
#include <span>

#include "device.cuh"

namespace fedlora::cuda {

// grams [modules, R, R] with R the sum of the ranks, scale [modules, K]; products [modules, K, K].
// The ranks are in the host's memory.
void client_products(int64_t modules, std::span<const int64_t> ranks, const double* gram_b,
                     const double* gram_a, const double* scale, double* products, Stream stream);

}  // namespace fedlora::cuda
