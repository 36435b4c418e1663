// stacked_svd for float64 data, whatever the shape: nothing is squared.
//
//   B T^+ = Q_B R_B     (T A)^T = Q_A R_A     R_B D R_A^T = U S V^T     B_g = Q_B U_p S_p, A_g =
//   V_p^T Q_A^T
//
// T equilibrates as in spectrum, rounded to powers of two so that it costs no digit. The reflectors
// are applied to p columns; Q_B and Q_A are never formed.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "lapack.h"
#include "memory.h"
#include "parallel.h"
#include "rank.h"
#include "stacked_svd.h"

namespace fedlora {
namespace {

constexpr double kSpeed = 10;  // operations a nanosecond of one thread

// One side, column-major [depth, R], then its QR in place.
struct Side {
  int64_t depth;
  int64_t rank;
  Buffer<double> data;
  std::vector<double> tau;

  explicit Side(const Factors& x)
      : depth(x.depth), rank(x.rank), data(x.depth * x.rank), tau(std::min(x.depth, x.rank)) {
    int64_t column = 0;
    for (const Part* part = x.parts; part < x.parts + x.count; ++part) {
      for (int64_t k = 0; k < part->rank; ++k, ++column) {
        const auto* from = static_cast<const double*>(part->data);
        const int64_t start = x.rows ? k * part->stride : k;
        const int64_t step = x.rows ? 1 : part->stride;
        for (int64_t i = 0; i < depth; ++i) data[column * depth + i] = from[start + i * step];
      }
    }
  }

  int64_t small() const { return std::min(depth, rank); }

  double norm(int64_t column) const {
    // Scaled, so that squares neither overflow nor vanish.
    double largest = 0;
    for (int64_t i = 0; i < depth; ++i) {
      largest = std::max(largest, std::abs(data[column * depth + i]));
    }
    if (largest == 0 || !std::isfinite(largest)) return largest;
    double sum = 0;
    for (int64_t i = 0; i < depth; ++i) {
      const double value = data[column * depth + i] / largest;
      sum += value * value;
    }
    return largest * std::sqrt(sum);
  }

  void scale(int64_t column, double factor) {
    for (int64_t i = 0; i < depth; ++i) data[column * depth + i] *= factor;
  }

  void factorize() { lapack::qr(depth, rank, data.get(), tau.data()); }

  // R, column-major [small, R], its columns times scale where there is one.
  Buffer<double> upper(const double* scale) const {
    const int64_t rows = small();
    Buffer<double> r(rows * rank);
    for (int64_t j = 0; j < rank; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        r[j * rows + i] = i <= j ? data[j * depth + i] * (scale == nullptr ? 1 : scale[j]) : 0;
      }
    }
    return r;
  }

  // Q times the column-major coefficients [small, p], as [depth, p].
  Buffer<double> apply(const double* coefficients, int64_t p) const {
    Buffer<double> product(depth * p);
    for (int64_t c = 0; c < p; ++c) {
      std::copy_n(coefficients + c * small(), small(), product.get() + c * depth);
      std::fill_n(product.get() + c * depth + small(), depth - small(), 0.0);
    }
    if (p > 0) lapack::apply_q(depth, p, small(), data.get(), tau.data(), product.get());
    return product;
  }
};

// Returns the sum of the squared norms of the rank-1 terms.
double equilibrate(Side& b, Side& a, const double* scale) {
  double terms = 0;
  for (int64_t k = 0; k < b.rank; ++k) {
    const double norm_b = b.norm(k);
    const double norm_a = a.norm(k) * std::abs(scale[k]);
    terms += norm_b * norm_a * (norm_b * norm_a);
    const double ratio = norm_b / norm_a;
    if (!(ratio > 0) || !std::isfinite(ratio)) continue;
    const double factor = std::exp2(std::round(std::log2(ratio) / 2));
    b.scale(k, 1 / factor);
    a.scale(k, factor);
  }
  return terms;
}

}  // namespace

void svd_by_qr(const Factors& b, const Factors& a, const double* scale, const SvdOptions& options,
               int threads, const SvdResult& result) {
  const int64_t rank = b.rank;
  Side left(b);
  Side right(a);
  const double terms = equilibrate(left, right, scale);
  const double squared = static_cast<double>(rank) * static_cast<double>(rank);
  const double flops = 2 * squared * static_cast<double>(b.depth + a.depth);
  parallel_for(2, team(flops / kSpeed, threads),
               [&](int64_t side) { (side == 0 ? left : right).factorize(); });

  const int64_t rows = left.small();
  const int64_t columns = right.small();
  const int64_t small = std::min(rows, columns);
  const Buffer<double> upper_b = left.upper(scale);
  const Buffer<double> upper_a = right.upper(nullptr);
  const Buffer<double> core(rows * columns);
  const Buffer<double> u(rows * small);
  const Buffer<double> vt(small * columns);
  const Buffer<double> values(small);
  if (small > 0) {
    lapack::gemm(false, true, rows, columns, rank, 1, upper_b.get(), rows, upper_a.get(), columns,
                 0, core.get(), rows);
    double sum = 0;
    for (int64_t i = 0; i < rows * columns; ++i) sum += std::abs(core[i]);
    if (!std::isfinite(sum + terms) ||
        !lapack::svd(rows, columns, core.get(), values.get(), u.get(), vt.get())) {
      throw std::runtime_error(
          "the factors hold values that are not finite, or overflow in products");
    }
  }
  double total = 0;
  const Buffer<double> squares(small);
  for (int64_t i = 0; i < small; ++i) total += squares[i] = values[i] * values[i];
  const int64_t count = counted(small, squares.get(), terms, rank, result.sigma);
  std::copy_n(values.get(), count, result.sigma);
  const int64_t p = select_rank(result.sigma, rank, total, options.energy, options.width);
  *result.rank = p;

  const Buffer<double> v(columns * p);
  for (int64_t c = 0; c < p; ++c) {
    for (int64_t i = 0; i < rows; ++i) u[c * rows + i] *= result.sigma[c];
    for (int64_t i = 0; i < columns; ++i) v[c * columns + i] = vt[i * small + c];
  }
  const Buffer<double> b_g = left.apply(u.get(), p);
  const Buffer<double> a_g = right.apply(v.get(), p);
  auto* to_b = static_cast<double*>(result.b_g);
  auto* to_a = static_cast<double*>(result.a_g);
  std::fill_n(to_b, b.depth * options.width, 0.0);
  std::fill_n(to_a, options.width * a.depth, 0.0);
  for (int64_t c = 0; c < p; ++c) {
    for (int64_t i = 0; i < b.depth; ++i) to_b[i * options.width + c] = b_g[c * b.depth + i];
  }
  std::copy_n(a_g.get(), p * a.depth, to_a);
}

}  // namespace fedlora
