#include "matrices.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/kernels.h"

namespace fedlora::tests {

Matrix random(int64_t rows, int64_t columns, uint64_t seed) {
  Matrix matrix(static_cast<size_t>(rows * columns));
  uint64_t state = seed * 0x9E3779B97F4A7C15ULL + 1;
  for (double& value : matrix) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    value = static_cast<double>(state >> 11) * 0x1p-52 - 1;
  }
  return matrix;
}

std::vector<char> narrowed(const Matrix& matrix, DType dtype) {
  std::vector<char> bytes(matrix.size() * static_cast<size_t>(bytes_of(dtype)));
  kernels().narrow(dtype, matrix.data(), static_cast<int64_t>(matrix.size()), bytes.data());
  return bytes;
}

Matrix widened(const std::vector<char>& bytes, DType dtype) {
  Matrix matrix(bytes.size() / static_cast<size_t>(bytes_of(dtype)));
  kernels().widen(dtype, bytes.data(), static_cast<int64_t>(matrix.size()), matrix.data());
  return matrix;
}

Matrix rounded(const Matrix& matrix, DType dtype) {
  return widened(narrowed(matrix, dtype), dtype);
}

Matrix product(const Matrix& left, const Matrix& right, int64_t m, int64_t k, int64_t n) {
  Matrix result(static_cast<size_t>(m * n), 0.0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t l = 0; l < k; ++l) {
      for (int64_t j = 0; j < n; ++j) result[i * n + j] += left[i * k + l] * right[l * n + j];
    }
  }
  return result;
}

Matrix transposed(const Matrix& matrix, int64_t rows, int64_t columns) {
  Matrix result(matrix.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) result[j * rows + i] = matrix[i * columns + j];
  }
  return result;
}

double largest(const Matrix& matrix) {
  double found = 0;
  for (const double value : matrix) found = std::max(found, std::abs(value));
  return found;
}

double distance(const Matrix& left, const Matrix& right) {
  double found = 0;
  for (size_t i = 0; i < left.size(); ++i) found = std::max(found, std::abs(left[i] - right[i]));
  return found;
}

Side::Side(const Matrix& stacked, bool rows, std::vector<int64_t> ranks, int64_t depth, DType dtype)
    : factors_{dtype, rows, 0, depth, nullptr, static_cast<int64_t>(ranks.size())} {
  int64_t total = 0;
  for (const int64_t rank : ranks) total += rank;
  int64_t offset = 0;
  for (const int64_t rank : ranks) {
    const int64_t height = rows ? rank : depth;
    const int64_t width = rows ? depth : rank;
    const int64_t stride = width + 3;
    Matrix padded(static_cast<size_t>(height * stride), 1e30);
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        padded[i * stride + j] =
            rows ? stacked[(offset + i) * depth + j] : stacked[i * total + offset + j];
      }
    }
    padded.resize(static_cast<size_t>(height * stride - (height > 0 ? 3 : 0)));
    memory_.push_back(narrowed(padded, dtype));
    parts_.push_back({memory_.back().data(), rank, stride});
    offset += rank;
  }
  factors_.rank = total;
  factors_.parts = parts_.data();
}

}  // namespace fedlora::tests
