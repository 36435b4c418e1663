// Products of a batch of R x R matrices between the steps of spectrum:
//
//   C[i, j] = row_i column_j sum_t A[i, t] B[t, j]
//
// with extents that each module decides for itself, on the device, and zeros beyond them.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace fedlora::cuda {

// Element (i, j) of module l lies at data[l * module + i * row + j * column].
template <class T>
struct Strided {
  T* data;
  int64_t module;
  int row;
  int column;
};

struct Product {
  int64_t modules;
  int rows;  // of C, which is written whole
  int columns;
  int depth;
  Strided<const double> a;
  Strided<const double> b;
  Strided<double> c;
  const int* kept_rows;         // [L] the rows of C that are not zero, or null for all
  const int* kept_columns;      // likewise
  const int* kept_depth;        // likewise
  const double* row_factor;     // [L, stride], or null for 1
  const double* depth_factor;   // likewise, on the inner index
  const double* column_factor;  // likewise
  bool inverse_squares;         // row_factor holds sigma: rows are divided by its squares
  int64_t factor_stride;
  const int* solved;  // [L] where not 0, C is left alone; or null
};

void multiply(const Product& product, Stream stream);

}  // namespace fedlora::cuda
