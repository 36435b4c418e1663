#include "leading.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels.h"
#include "lapack.h"

namespace fedlora {
namespace {

constexpr int64_t kSmall = 256;      // up to here a tridiagonal matrix is no slower, come what may
constexpr int64_t kFewest = 3;       // one eigenvector in so many is few: inverse iteration pays
constexpr int kLargest = 400;        // exponent beyond which M is scaled before it is reduced
constexpr int64_t kBlock = 16;       // the commonest LoRA rank: what one shared A contributes
constexpr double kConverged = 1e-9;  // residual over theta_1; theta errs by its square
constexpr int64_t kApplied = 16;     // of M that is not formed, one dimension in so many is tried
constexpr int64_t kPasses = 5;       // of orthogonalisation; two suffice but for lost directions

double dot(const double* x, const double* y, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

class Krylov {
 public:
  // square: ||M||_F^2, infinite where it is not known. dimensions: how many the space may have.
  Krylov(const Applied& m, double square, int64_t dimensions, double wanted, int64_t cap)
      : n_(m.n),
        limit_(dimensions / kBlock * kBlock),
        wanted_(wanted),
        cap_(std::min(cap, m.n)),
        m_(m),
        basis_(n_ * (limit_ + kBlock)),
        inner_(limit_ * kBlock),
        h_(limit_ * limit_),
        ritz_(limit_ * limit_),
        theta_(limit_),
        upper_(kBlock * kBlock),
        tau_(kBlock),
        square_(square) {}

  // Whether `found` holds certified pairs.
  bool run(Eigenpairs& found) {
    if (limit_ < kBlock) return false;
    start();
    while (size_ < limit_) {
      grow();
      if (promising() && certified()) {
        collect(found);
        return true;
      }
    }
    return false;
  }

 private:
  void start() {
    uint64_t state = 0x9E3779B97F4A7C15ULL;
    for (int64_t i = 0; i < n_ * kBlock; ++i) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      basis_[i] = static_cast<double>(state >> 11) * 0x1p-53 - 0.5;
    }
    orthonormalize(basis_.get());
  }

  // Q and R of one block; R goes to upper_.
  void orthonormalize(double* block) {
    lapack::qr(n_, kBlock, block, tau_.get());
    for (int64_t j = 0; j < kBlock; ++j) {
      for (int64_t i = 0; i < kBlock; ++i) {
        upper_[j * kBlock + i] = i <= j ? block[j * n_ + i] : 0;
      }
    }
    lapack::q_columns(n_, kBlock, block, tau_.get());
  }

  // One block more: extends H by its columns and leaves the next block behind it.
  void grow() {
    const double* last = basis_.get() + size_ * n_;
    double* next = basis_.get() + (size_ + kBlock) * n_;
    m_.apply(kBlock, last, next);
    image_square_ += dot(next, next, n_ * kBlock);
    size_ += kBlock;
    project(next);
    for (int64_t j = 0; j < kBlock; ++j) {
      const int64_t column = size_ - kBlock + j;
      for (int64_t i = 0; i < size_; ++i) {
        h_[column * limit_ + i] = h_[i * limit_ + column] = inner_[j * size_ + i];
      }
    }
    project(next);
    orthonormalize(next);
    std::copy_n(upper_.get(), kBlock * kBlock, tie_);
    // A block that lies in the space already leaves noise: clean it until it is orthogonal.
    for (int64_t pass = 2; pass < kPasses; ++pass) {
      project(next);
      orthonormalize(next);
      double least = 1;
      for (int64_t i = 0; i < kBlock; ++i) {
        least = std::min(least, std::abs(upper_[i * kBlock + i]));
      }
      if (least > 0.5) break;
    }
  }

  // block -= V V^T block; V^T block goes to inner_.
  void project(double* block) {
    lapack::gemm(true, false, size_, kBlock, n_, 1, basis_.get(), n_, block, n_, 0, inner_.get(),
                 size_);
    lapack::gemm(false, false, n_, kBlock, size_, -1, basis_.get(), n_, inner_.get(), size_, 1,
                 block, n_);
  }

  // What any certificate needs, before a Ritz problem is solved for one.
  bool promising() const {
    double captured = 0;
    double square = 0;
    for (int64_t j = 0; j < size_; ++j) {
      captured += h_[j * limit_ + j];
      square += dot(h_.get() + j * limit_, h_.get() + j * limit_, size_);
    }
    if (captured >= wanted_) return true;
    const double missed = square_ - 2 * image_square_ + square;
    return size_ >= cap_ && std::min(m_.trace - captured, std::sqrt(std::max(missed, 0.0))) <=
                                captured / static_cast<double>(cap_);
  }

  bool certified() {
    for (int64_t j = 0; j < size_; ++j) {
      std::copy_n(h_.get() + j * limit_, size_, ritz_.get() + j * size_);
    }
    if (!lapack::symmetric_eigen(size_, ritz_.get(), theta_.get())) return false;
    double sum = 0;
    double square = 0;
    double all = 0;
    for (int64_t i = 0; i < size_; ++i) all += theta_[i];
    needed_ = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const double value = theta_[size_ - 1 - i];
      const double* vector = ritz_.get() + (size_ - 1 - i) * size_;
      if (residual(vector + size_ - kBlock) > kConverged * theta_[size_ - 1]) return false;
      sum += value;
      square += value * value;
      if (needed_ == 0 && (sum >= wanted_ || i + 1 == cap_)) {
        needed_ = i + 1;
        threshold_ = value;
        const double next = i + 1 < size_ ? theta_[size_ - 2 - i] : 0;
        if (m_.trace - all + next <= threshold_) return true;
      }
      const double missed = std::min(m_.trace - sum, std::sqrt(std::max(square_ - square, 0.0)));
      if (needed_ > 0 && missed <= threshold_) return true;
    }
    return false;
  }

  // ||M v - theta v|| of a Ritz pair from the last rows of its coefficients.
  double residual(const double* coefficients) const {
    double square = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      double sum = 0;
      for (int64_t j = i; j < kBlock; ++j) sum += tie_[j * kBlock + i] * coefficients[j];
      square += sum * sum;
    }
    return std::sqrt(square);
  }

  void collect(Eigenpairs& found) {
    found.count = needed_;
    found.values = Buffer<double>(n_);
    found.vectors = Buffer<double>(n_ * needed_);
    std::fill_n(found.values.get(), n_, 0.0);
    Buffer<double> descending(size_ * needed_);
    for (int64_t i = 0; i < needed_; ++i) {
      found.values[i] = std::max(theta_[size_ - 1 - i], 0.0);
      std::copy_n(ritz_.get() + (size_ - 1 - i) * size_, size_, descending.get() + i * size_);
    }
    lapack::gemm(false, false, n_, needed_, size_, 1, basis_.get(), n_, descending.get(), size_, 0,
                 found.vectors.get(), n_);
  }

  const int64_t n_;
  const int64_t limit_;
  const double wanted_;
  const int64_t cap_;
  const Applied& m_;
  Buffer<double> basis_;
  Buffer<double> inner_;
  Buffer<double> h_;
  Buffer<double> ritz_;
  Buffer<double> theta_;
  Buffer<double> upper_;
  Buffer<double> tau_;
  double tie_[kBlock * kBlock] = {};
  int64_t size_ = 0;
  int64_t needed_ = 0;
  const double square_;
  double image_square_ = 0;
  double threshold_ = 0;
};

// V (3 - V^T V) / 2: columns that are orthonormal to 1e-8 become so to rounding.
void orthonormalize(int64_t n, int64_t count, double* vectors) {
  const Buffer<double> products(count * count);
  const Buffer<double> copy(n * count);
  std::copy_n(vectors, n * count, copy.get());
  lapack::gemm(true, false, count, count, n, 1, vectors, n, vectors, n, 0, products.get(), count);
  lapack::gemm(false, false, n, count, count, -0.5, copy.get(), n, products.get(), count, 1.5,
               vectors, n);
}

// M = Q T Q^T: all eigenvalues of T, and only as many of its eigenvectors as are wanted.
class Tridiagonal {
 public:
  Tridiagonal(int64_t n, double* m, double trace)
      : n_(n), m_(m), trace_(trace), diagonal_(n), beside_(n), tau_(n), values_(n) {
    exponent_ = trace == 0 ? 0 : std::ilogb(trace);
    if (std::abs(exponent_) < kLargest) exponent_ = 0;
    if (exponent_ != 0) {
      for (int64_t i = 0; i < n * n; ++i) m[i] = std::ldexp(m[i], -exponent_);
    }
    const Buffer<double> scratch(4 * n + 64);
    kernels().tridiagonal(n, m, diagonal_.get(), beside_.get(), tau_.get(), scratch.get());
    std::copy_n(diagonal_.get(), n, values_.get());
  }

  Eigenpairs leading(double wanted, int64_t cap) {
    Eigenpairs found;
    int64_t count = needed(wanted, cap);
    Buffer<double> ascending(n_ * count);
    if (count < n_ && inverse_iteration(count, ascending.get())) {
      kernels().apply_reflectors(n_, count, m_, tau_.get(), ascending.get());
    } else {
      if (count < n_) ascending = Buffer<double>(n_ * n_);
      count = n_;
      std::copy_n(diagonal_.get(), n_, values_.get());
      found.converged =
          lapack::tridiagonal_eigen(n_, values_.get(), beside_.get(), ascending.get());
      lapack::apply_tridiagonal_q(n_, n_, m_, tau_.get(), ascending.get());
    }
    found.count = count;
    found.values = Buffer<double>(n_);
    found.vectors = Buffer<double>(n_ * count);
    std::fill_n(found.values.get(), n_, 0.0);
    for (int64_t i = 0; i < count; ++i) {
      found.values[i] = std::ldexp(std::max(values_[n_ - 1 - i], 0.0), exponent_);
      std::copy_n(ascending.get() + (count - 1 - i) * n_, n_, found.vectors.get() + i * n_);
    }
    return found;
  }

 private:
  // How many eigenpairs reach `wanted` or `cap`, with all eigenvalues in values_; n where they are
  // too many for one by one.
  int64_t needed(double wanted, int64_t cap) const {
    if (kFewest * cap > n_ && !(wanted < (1 - kConverged) * trace_)) return n_;
    const Buffer<double> beside(n_);
    std::copy_n(beside_.get(), n_ - 1, beside.get());
    if (!lapack::tridiagonal_values(n_, values_.get(), beside.get())) return n_;
    wanted = std::ldexp(wanted, -exponent_);
    int64_t count = 0;
    for (double sum = 0; count < n_;) {
      sum += values_[n_ - ++count];
      if (sum >= wanted || count >= cap) break;
    }
    return kFewest * count > n_ ? n_ : count;
  }

  bool inverse_iteration(int64_t count, double* ascending) const {
    if (!lapack::tridiagonal_vectors(n_, diagonal_.get(), beside_.get(), count,
                                     values_.get() + n_ - count, ascending)) {
      return false;
    }
    orthonormalize(n_, count, ascending);
    return true;
  }

  const int64_t n_;
  double* const m_;
  const double trace_;
  Buffer<double> diagonal_;
  Buffer<double> beside_;
  Buffer<double> tau_;
  Buffer<double> values_;
  int exponent_ = 0;
};

double share_of(double wanted, double trace) { return trace > 0 ? wanted / trace : 1; }

// Whether residuals can tell apart what is wanted: not the last 1e-9 of the energy.
bool in_reach(double share, int64_t cap, int64_t dimensions) {
  return share < 1 - kConverged || cap <= dimensions;
}

}  // namespace

bool krylov_pays(int64_t n, double share, int64_t cap) {
  return n > kSmall && in_reach(share, cap, n / 4);
}

bool leading_eigenpairs(const Applied& m, double wanted, int64_t cap, Eigenpairs& found) {
  const int64_t dimensions = m.n / kApplied;
  constexpr double unknown = std::numeric_limits<double>::infinity();
  return in_reach(share_of(wanted, m.trace), cap, dimensions) &&
         Krylov(m, unknown, dimensions, wanted, cap).run(found);
}

Eigenpairs leading_eigenpairs(int64_t n, double* m, double wanted, int64_t cap) {
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += m[i * n + i];
  if (!std::isfinite(trace)) {
    Eigenpairs none;
    none.converged = false;
    return none;
  }
  if (krylov_pays(n, share_of(wanted, trace), cap)) {
    const Applied formed{n, trace, [=](int64_t count, const double* block, double* image) {
                           lapack::gemm(false, false, n, count, n, 1, m, n, block, n, 0, image, n);
                         }};
    Eigenpairs found;
    if (Krylov(formed, dot(m, m, n * n), n / 4, wanted, cap).run(found)) return found;
  }
  if (n == 0) return Eigenpairs{.values = Buffer<double>(), .vectors = Buffer<double>()};
  return Tridiagonal(n, m, trace).leading(wanted, cap);
}

}  // namespace fedlora
