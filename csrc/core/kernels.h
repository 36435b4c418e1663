// The loops that touch the adapters' data, compiled for several instruction sets.
//
// One source (kernels_body.h) is compiled as AVX-512, AVX2 and portable code; kernels() gives the
// best of them for this machine. All of them widen bf16, fp16 and fp32 panels to the accumulator's
// type while packing them into cache, so the adapters are read once and never copied in memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "factors.h"

namespace fedlora {

struct Kernels {
  const char* name;
  int64_t tile_columns;  // columns of the register tile in float64; float32 has twice as many

  // Upper triangle of the R x R Gram matrix g (row-major, float64), columns of the tiles
  // [first, last) only, rows 0..column: g += x x^T or x^T x. With `fast` sums run in float32 over
  // at most 256 terms. scratch: gram_scratch bytes, 64-byte aligned.
  void (*gram)(const Factors& x, bool fast, int64_t first, int64_t last, double* g, void* scratch);
  size_t (*gram_scratch)(int64_t rank);

  // Coefficients x [R, width] (row-major) in the layout that left() reads; the packed matrix holds
  // packed_size(R, width) numbers.
  void (*pack_left)(const double* x, int64_t rank, int64_t width, bool single, void* packed);
  int64_t (*packed_size)(int64_t rank, int64_t width);

  // out[i, 0:width] = B[i, :] X for rows [first, last), rounded to B's type; out has `stride`
  // columns, those from width on are set to zero. `single` forms products in float32.
  void (*left)(const Factors& b, const void* packed, int64_t width, bool single, int64_t first,
               int64_t last, void* out, int64_t stride, void* scratch);

  // out[0:height, j] = Y A[:, j] for columns [first, last), rounded to A's type. y [height, R] is
  // row-major in float32 when `single`, else float64, padded to a multiple of 8 rows.
  void (*right)(const Factors& a, const void* y, int64_t height, bool single, int64_t first,
                int64_t last, void* out, void* scratch);
  size_t (*combine_scratch)(int64_t rank);

  // out[i] = sum_k weights[k] sources[k][i], accumulated in float64, rounded once.
  void (*weighted_sum)(DType dtype, const void* const* sources, const double* weights,
                       int64_t clients, int64_t count, void* out);

  // products[k] += sum of b[i] a[i] over the ranks[k] entries of client k, of `clients` clients
  // that follow each other.
  void (*add_products)(const int64_t* ranks, int64_t clients, const double* b, const double* a,
                       double* products);

  // The symmetric a [n, n] (both triangles, destroyed) as Q T Q^T: T in diagonal [n] and beside
  // [n - 1]; Q as reflectors in the layout of LAPACK's dsytrd("L"), with tau [n]. scratch: 4 n + 64
  // numbers.
  void (*tridiagonal)(int64_t n, double* a, double* diagonal, double* beside, double* tau,
                      double* scratch);

  // c = Q c for the Q of tridiagonal(), c [n, count] column-major.
  void (*apply_reflectors)(int64_t n, int64_t count, const double* a, const double* tau, double* c);

  // wide[i] = x[i] in float64.
  void (*widen)(DType dtype, const void* x, int64_t count, double* wide);

  // x[i] = wide[i], rounded to nearest even once.
  void (*narrow)(DType dtype, const double* wide, int64_t count, void* x);
};

// The best set for this machine. FEDLORA_ISA=avx512|avx2|portable asks for one by name.
const Kernels& kernels();

// The set of that name, or null where it was not compiled or the machine lacks the instructions.
const Kernels* kernels(const char* name);

}  // namespace fedlora
