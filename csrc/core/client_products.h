// client_products: inner products of the clients' own updates, from two Gram matrices.
//
//   <s_j B_j A_j, s_k B_k A_k> = s_j s_k sum(G_B^{jk} * G_A^{jk})
//
// Both matrices are read once, row by row: of large ones the lower triangles.
#pragma once

#include <cstdint>
#include <span>

namespace fedlora {

// About how long that takes one thread.
double client_products_nanoseconds(int64_t rank);

// One module: grams [R, R] with R the sum of the ranks, scale [K]; products [K, K].
void client_products(std::span<const int64_t> ranks, const double* gram_b, const double* gram_a,
                     const double* scale, int threads, double* products);

}  // namespace fedlora
