// Families of factors, and the plain float64 products the core is compared with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/factors.h"

namespace fedlora::tests {

using Matrix = std::vector<double>;  // row-major

// Uniform in (-1, 1), the same everywhere.
Matrix random(int64_t rows, int64_t columns, uint64_t seed);

// Rounded to the type's values.
Matrix rounded(const Matrix& matrix, DType dtype);

// [m, k] x [k, n]
Matrix product(const Matrix& left, const Matrix& right, int64_t m, int64_t k, int64_t n);

Matrix transposed(const Matrix& matrix, int64_t rows, int64_t columns);

double largest(const Matrix& matrix);
double distance(const Matrix& left, const Matrix& right);  // largest difference

// One side of a module with its memory: clients of the given ranks, each in rows of its own stride.
class Side {
 public:
  Side(const Matrix& stacked, bool rows, std::vector<int64_t> ranks, int64_t depth, DType dtype);
  Side(const Side&) = delete;
  Side& operator=(const Side&) = delete;

  const Factors& factors() const { return factors_; }

 private:
  std::vector<std::vector<char>> memory_;
  std::vector<Part> parts_;
  Factors factors_;
};

// The adapters' bytes as float64 and back.
Matrix widened(const std::vector<char>& bytes, DType dtype);
std::vector<char> narrowed(const Matrix& matrix, DType dtype);

}  // namespace fedlora::tests
