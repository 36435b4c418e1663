#include "spectrum.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "lapack.h"
#include "mirror.h"
#include "rank.h"

namespace fedlora {
namespace {

constexpr double kPlainCholesky = 1e4;  // times R eps: pivots that need no pivoting
constexpr int64_t kUnformed = 1024;     // from this rank on M is applied before it is formed
constexpr double kKnown = 1e-6;  // share of the terms that clients leave: the sum has nine digits

// <D G_B D, G_A>: the trace of M.
double squared_norm(int64_t rank, const double* gram_b, const double* gram_a, const double* scale) {
  double diagonal = 0;
  double beside = 0;
  for (int64_t i = 0; i < rank; ++i) {
    const double* b = gram_b + i * rank;
    const double* a = gram_a + i * rank;
    double row = 0;
    for (int64_t j = 0; j < i; ++j) row += b[j] * a[j] * scale[j];
    beside += row * scale[i];
    diagonal += b[i] * a[i] * scale[i] * scale[i];
  }
  return diagonal + 2 * beside;
}

}  // namespace

double spectrum_nanoseconds(int64_t rank) {
  const auto size = static_cast<double>(rank);
  return size * size * (30 + size / 10);
}

Spectrum::Spectrum(int64_t rank, const double* gram_b, const double* gram_a, const double* scale,
                   double noise, double energy, int64_t cap)
    : rank_(rank),
      row_(rank, 0.0),
      inverse_(rank, 0.0),
      pivot_(rank),
      lower_(rank * rank),
      sigma_(rank) {
  std::fill_n(sigma_.get(), rank, 0.0);
  for (int64_t i = 0; i < rank; ++i) {
    const double norm_b = std::sqrt(std::max(gram_b[i * rank + i], 0.0));
    const double norm_a = std::sqrt(std::max(gram_a[i * rank + i], 0.0)) * std::abs(scale[i]);
    terms_ += norm_b * norm_a * (norm_b * norm_a);
    if (norm_b == 0 || norm_a == 0) continue;
    row_[i] = std::sqrt(norm_b / norm_a) * scale[i];
    inverse_[i] = std::sqrt(norm_a / norm_b);
  }
  // LAPACK takes a NaN on the diagonal for the end of the rank.
  if (!std::isfinite(terms_)) {
    total_ = std::numeric_limits<double>::quiet_NaN();
    eigen_.converged = false;
    return;
  }
  factor(gram_a, noise);
  if (!(noise == 0 && by_products(gram_b, gram_a, scale, energy, cap))) {
    Buffer<double> m(kept_ * kept_);
    core(gram_b, m.get());
    total_ = 0;
    for (int64_t i = 0; i < kept_; ++i) total_ += m[i * kept_ + i];
    eigen_ = leading_eigenpairs(kept_, m.get(), wanted_energy(energy, total_, rank), cap);
  }
  if (!eigen_.converged) return;
  count_ = counted(eigen_.count, eigen_.values.get(), terms_, rank, sigma_.get());
}

// L of T D G_A D T.
void Spectrum::factor(const double* gram_a, double noise) {
  const int64_t rank = rank_;
  if (rank == 0) return;  // which LAPACK calls an illegal value, on stderr
  double largest = 0;
  const auto fill = [&] {
    for (int64_t j = 0; j < rank; ++j) {
      for (int64_t i = j; i < rank; ++i) {
        lower_[j * rank + i] = row_[i] * gram_a[j * rank + i] * row_[j];
      }
      largest = std::max(largest, lower_[j * rank + j]);
    }
  };
  fill();
  const double tolerance = std::max(negligible(rank), noise) * largest;
  plain_ = lapack::cholesky(rank, lower_.get(), rank);
  for (int64_t i = 0; plain_ && i < rank; ++i) {
    const double pivot = lower_[i * rank + i];
    plain_ = pivot * pivot > kPlainCholesky * tolerance;
  }
  if (plain_) {
    std::iota(pivot_.begin(), pivot_.end(), int64_t{0});
    kept_ = rank;
  } else {
    fill();
    kept_ = lapack::pivoted_cholesky(rank, lower_.get(), rank, pivot_.data(), tolerance);
  }
  for (int64_t j = 0; j < kept_; ++j) std::fill_n(lower_.get() + j * rank, j, 0.0);
}

// M = L^T T^+ G_B T^+ L, both triangles.
void Spectrum::core(const double* gram_b, double* m) const {
  const int64_t rank = rank_;
  if (kept_ == 0) return;
  Buffer<double> scaled(rank * rank);
  for (int64_t j = 0; j < rank; ++j) {
    const double* column = gram_b + pivot_[j] * rank;
    const double factor = inverse_[pivot_[j]];
    double* to = scaled.get() + j * rank;
    if (plain_) {
      for (int64_t i = 0; i < rank; ++i) to[i] = inverse_[i] * column[i] * factor;
    } else {
      for (int64_t i = 0; i < rank; ++i) to[i] = inverse_[pivot_[i]] * column[pivot_[i]] * factor;
    }
  }
  if (kept_ == rank) {
    lapack::trmm(true, true, rank, rank, lower_.get(), rank, scaled.get(), rank);
    lapack::trmm(false, false, rank, rank, lower_.get(), rank, scaled.get(), rank);
    std::copy_n(scaled.get(), rank * rank, m);
  } else {
    Buffer<double> half(rank * kept_);
    lapack::gemm(false, false, rank, kept_, rank, 1, scaled.get(), rank, lower_.get(), rank, 0,
                 half.get(), rank);
    lapack::gemm(true, false, kept_, kept_, rank, 1, lower_.get(), rank, half.get(), rank, 0, m,
                 kept_);
  }
  mirror(kept_, m);
}

// Whether the eigenpairs that are wanted come from applying a large M.
bool Spectrum::by_products(const double* gram_b, const double* gram_a, const double* scale,
                           double energy, int64_t cap) {
  if (kept_ < kUnformed) return false;
  total_ = squared_norm(rank_, gram_b, gram_a, scale);
  if (!(total_ > kKnown * terms_)) return false;
  const Applied m{kept_, total_, [&](int64_t count, const double* block, double* image) {
                    apply(gram_b, count, block, image);
                  }};
  return leading_eigenpairs(m, wanted_energy(energy, total_, rank_), cap, eigen_);
}

// M block, for a block [kept, count].
void Spectrum::apply(const double* gram_b, int64_t count, const double* block,
                     double* image) const {
  const int64_t rank = rank_;
  const Buffer<double> pivoted(rank * count);
  const Buffer<double> placed(rank * count);
  lapack::gemm(false, false, rank, count, kept_, 1, lower_.get(), rank, block, kept_, 0,
               pivoted.get(), rank);
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t i = 0; i < rank; ++i) {
      placed[c * rank + pivot_[i]] = inverse_[pivot_[i]] * pivoted[c * rank + i];
    }
  }
  const Buffer<double> product(rank * count);
  lapack::gemm(false, false, rank, count, rank, 1, gram_b, rank, placed.get(), rank, 0,
               product.get(), rank);
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t i = 0; i < rank; ++i) {
      pivoted[c * rank + i] = inverse_[pivot_[i]] * product[c * rank + pivot_[i]];
    }
  }
  lapack::gemm(true, false, kept_, count, rank, 1, lower_.get(), rank, pivoted.get(), rank, 0,
               image, kept_);
}

void Spectrum::left(int64_t p, double* x) const {
  if (p == 0) return;
  Buffer<double> product(rank_ * p);
  lapack::gemm(false, false, rank_, p, kept_, 1, lower_.get(), rank_, eigen_.vectors.get(), kept_,
               0, product.get(), rank_);
  for (int64_t i = 0; i < rank_; ++i) {
    for (int64_t c = 0; c < p; ++c) {
      x[pivot_[i] * p + c] = inverse_[pivot_[i]] * product[c * rank_ + i];
    }
  }
}

void Spectrum::right(int64_t p, double* y) const {
  if (p == 0) return;
  Buffer<double> solution(kept_ * p);
  std::copy_n(eigen_.vectors.get(), kept_ * p, solution.get());
  lapack::solve_transposed(kept_, p, lower_.get(), rank_, solution.get(), kept_);
  std::fill_n(y, p * rank_, 0.0);
  for (int64_t c = 0; c < p; ++c) {
    for (int64_t i = 0; i < kept_; ++i) {
      y[c * rank_ + pivot_[i]] = solution[c * kept_ + i] * row_[pivot_[i]];
    }
  }
}

}  // namespace fedlora
