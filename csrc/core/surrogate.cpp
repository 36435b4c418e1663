#include "surrogate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "lapack.h"
#include "memory.h"

namespace fedlora {
namespace {

// How far beyond a sweep's end it looks, in sweeps.
constexpr double kLooks[] = {2, 5, 15};
constexpr double kEps = std::numeric_limits<double>::epsilon();

// One Gram matrix as P: block pairs (u <= v) by entries (i <= j), entries off the diagonal times
// sqrt(2) so that inner products of packed blocks are those of whole symmetric blocks.
class PackedGram {
 public:
  PackedGram(int64_t clients, int64_t rank, const double* gram, const double* scale)
      : clients_(clients),
        entries_(rank * (rank + 1) / 2),
        pairs_(clients * (clients + 1) / 2),
        packed_(pairs_ * entries_) {
    const int64_t width = clients * rank;
    double* to = packed_.get();
    for (int64_t u = 0; u < clients; ++u) {
      for (int64_t v = u; v < clients; ++v) {
        const double factor = (scale == nullptr ? 1 : scale[u] * scale[v]);
        const double* block = gram + u * rank * width + v * rank;
        for (int64_t i = 0; i < rank; ++i) {
          *to++ = factor * block[i * width + i];
          for (int64_t j = i + 1; j < rank; ++j) {
            *to++ = factor * (block[i * width + j] + block[j * width + i]) / std::sqrt(2.0);
          }
        }
      }
    }
  }

  // S(mixing), packed.
  void quadratic(const double* mixing, std::vector<double>& s) const {
    std::vector<double> products;
    products.reserve(static_cast<size_t>(pairs_));
    for (int64_t u = 0; u < clients_; ++u) {
      for (int64_t v = u; v < clients_; ++v) {
        products.push_back(mixing[u] * mixing[v] * (u == v ? 1 : 2));
      }
    }
    s.resize(static_cast<size_t>(entries_));
    lapack::gemv(false, entries_, pairs_, 1, packed_.get(), entries_, products.data(), 0, s.data());
  }

  // H_uv = <G^{uv}, s>, [K, K].
  void normal(const std::vector<double>& s, std::vector<double>& h) const {
    std::vector<double> products(static_cast<size_t>(pairs_));
    lapack::gemv(true, entries_, pairs_, 1, packed_.get(), entries_, s.data(), 0, products.data());
    h.resize(static_cast<size_t>(clients_ * clients_));
    const double* from = products.data();
    for (int64_t u = 0; u < clients_; ++u) {
      for (int64_t v = u; v < clients_; ++v) h[u * clients_ + v] = h[v * clients_ + u] = *from++;
    }
  }

 private:
  int64_t clients_;
  int64_t entries_;
  int64_t pairs_;
  Buffer<double> packed_;
};

// M, [K, K] row-major.
std::vector<double> cross(int64_t clients, int64_t rank, const double* gram_b, const double* gram_a,
                          const double* weights, const double* scale) {
  const int64_t width = clients * rank;
  // [K, R r]: row u holds column block u of every row; both sides alike, weights on one of them.
  const Buffer<double> left(width * width);
  const Buffer<double> right(width * width);
  for (int64_t u = 0; u < clients; ++u) {
    double* to = left.get() + u * width * rank;
    double* to_a = right.get() + u * width * rank;
    for (int64_t row = 0; row < width; ++row, to += rank, to_a += rank) {
      const double factor = weights[row / rank] * scale[row / rank] * scale[u];
      const double* from = gram_b + row * width + u * rank;
      for (int64_t j = 0; j < rank; ++j) to[j] = factor * from[j];
      std::copy_n(gram_a + row * width + u * rank, rank, to_a);
    }
  }
  std::vector<double> m(static_cast<size_t>(clients * clients));
  lapack::gemm(true, false, clients, clients, width * rank, 1, right.get(), width * rank,
               left.get(), width * rank, 0, m.data(), clients);
  return m;
}

// x = h^+ x, least norm, with h scaled to a unit diagonal first: a client with B times c and A over
// c is the same client. Cholesky while h is far from singular; else without the eigenvalues under
// 16 K eps of the largest, which duplicate clients bring and which are noise.
void solve(int64_t clients, std::vector<double> h, std::vector<double>& x) {
  std::vector<double> unit(static_cast<size_t>(clients), 0.0);
  for (int64_t i = 0; i < clients; ++i) {
    const double diagonal = h[i * clients + i];
    if (diagonal > 0) unit[i] = 1 / std::sqrt(diagonal);
  }
  for (int64_t i = 0; i < clients; ++i) {
    x[i] *= unit[i];
    for (int64_t j = 0; j < clients; ++j) h[i * clients + j] *= unit[i] * unit[j];
  }
  const double floor = 16 * static_cast<double>(clients) * kEps;
  std::vector<double> work = h;
  bool regular = lapack::cholesky(clients, work.data(), clients);
  for (int64_t i = 0; regular && i < clients; ++i) {
    const double pivot = work[i * clients + i];
    regular = pivot * pivot > 1e4 * floor;
  }
  if (regular) {
    lapack::cholesky_solve(clients, work.data(), clients, x.data());
  } else {
    std::vector<double> values(static_cast<size_t>(clients));
    std::vector<double> rotated(static_cast<size_t>(clients));
    lapack::symmetric_eigen(clients, h.data(), values.data());
    lapack::gemv(true, clients, clients, 1, h.data(), clients, x.data(), 0, rotated.data());
    for (int64_t i = 0; i < clients; ++i) {
      const bool kept = values[i] > 0 && values[i] > floor * values[clients - 1];
      rotated[i] = kept ? rotated[i] / values[i] : 0;
    }
    lapack::gemv(false, clients, clients, 1, h.data(), clients, rotated.data(), 0, x.data());
  }
  for (int64_t i = 0; i < clients; ++i) x[i] *= unit[i];
}

double bilinear(const std::vector<double>& q, const std::vector<double>& m,
                const std::vector<double>& p) {
  double sum = 0;
  for (size_t u = 0; u < q.size(); ++u) {
    for (size_t v = 0; v < p.size(); ++v) sum += q[u] * m[u * p.size() + v] * p[v];
  }
  return sum;
}

// Mixing weights with their quadratics.
struct Point {
  std::vector<double> p;
  std::vector<double> q;
  std::vector<double> s_a;
  std::vector<double> s_b;
};

// What both starts share.
struct Problem {
  int64_t clients;
  PackedGram b;
  PackedGram a;
  std::vector<double> m;
  double total;

  void measure(Point& point) const {
    a.quadratic(point.p.data(), point.s_a);
    b.quadratic(point.q.data(), point.s_b);
  }

  double value(const Point& point) const {
    double square = 0;
    for (size_t i = 0; i < point.s_a.size(); ++i) square += point.s_a[i] * point.s_b[i];
    return std::max(total - 2 * bilinear(point.q, m, point.p) + square, 0.0);
  }

  // Moves `next` to the best of the looks along the sweep from `here`. With d = next - here,
  // S(next + t d) = S(next) + t (S(next) + S(d) - S(here)) + t^2 S(d): one product a side for all.
  void look_further(const Point& here, Point& next) const {
    Point step = next;
    for (size_t k = 0; k < next.p.size(); ++k) {
      step.p[k] -= here.p[k];
      step.q[k] -= here.q[k];
    }
    measure(step);
    double least = value(next);
    double best = 0;
    Point look = next;
    for (const double t : kLooks) {
      for (size_t k = 0; k < next.p.size(); ++k) {
        look.p[k] = next.p[k] + t * step.p[k];
        look.q[k] = next.q[k] + t * step.q[k];
      }
      for (size_t i = 0; i < next.s_a.size(); ++i) {
        look.s_a[i] = next.s_a[i] + t * (next.s_a[i] + (1 + t) * step.s_a[i] - here.s_a[i]);
        look.s_b[i] = next.s_b[i] + t * (next.s_b[i] + (1 + t) * step.s_b[i] - here.s_b[i]);
      }
      const double found = value(look);
      if (found < least) {
        least = found;
        best = t;
      }
    }
    if (best == 0) return;
    for (size_t k = 0; k < next.p.size(); ++k) {
      next.p[k] += best * step.p[k];
      next.q[k] += best * step.q[k];
    }
    measure(next);
  }
};

// One start and where it has come to.
struct Descent {
  std::vector<double> p;
  std::vector<double> q;
  std::vector<double> objective;

  double best() const { return objective.back(); }

  void run(const Problem& problem, const SurrogateOptions& options) {
    const int64_t clients = problem.clients;
    Point here{p, q, {}, {}};
    problem.measure(here);
    objective = {problem.value(here)};
    std::vector<double> h;
    for (int64_t sweep = 0; sweep < options.max_sweeps; ++sweep) {
      Point next{std::vector<double>(p.size()), std::vector<double>(p.size()), {}, {}};
      problem.b.normal(here.s_a, h);
      lapack::gemv(true, clients, clients, 1, problem.m.data(), clients, here.p.data(), 0,
                   next.q.data());
      solve(clients, h, next.q);
      problem.b.quadratic(next.q.data(), next.s_b);
      problem.a.normal(next.s_b, h);
      lapack::gemv(false, clients, clients, 1, problem.m.data(), clients, next.q.data(), 0,
                   next.p.data());
      solve(clients, h, next.p);
      problem.a.quadratic(next.p.data(), next.s_a);
      problem.look_further(here, next);

      const double now = problem.value(next);
      if (!(now < best())) return;
      const double gain = best() - now;
      here = std::move(next);
      p = here.p;
      q = here.q;
      objective.push_back(now);
      if (!(gain > options.tolerance * problem.total)) return;
    }
  }
};

// The client with the largest update of its own.
int64_t dominant(int64_t clients, int64_t rank, const double* gram_b, const double* gram_a,
                 const double* weights, const double* scale) {
  const int64_t width = clients * rank;
  int64_t found = 0;
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < clients; ++k) {
    double square = 0;
    for (int64_t i = 0; i < rank; ++i) {
      const int64_t start = (k * rank + i) * width + k * rank;
      for (int64_t j = 0; j < rank; ++j) square += gram_b[start + j] * gram_a[start + j];
    }
    const double norm = weights[k] * std::sqrt(std::max(square, 0.0) * scale[k] * scale[k]);
    if (norm > largest) {
      largest = norm;
      found = k;
    }
  }
  return found;
}

double norm(const std::vector<double>& x) {
  double square = 0;
  for (const double value : x) square += value * value;
  return std::sqrt(square);
}

}  // namespace

void surrogate(int64_t clients, int64_t rank, const double* gram_b, const double* gram_a,
               const double* weights, const double* scale, const SurrogateOptions& options,
               double* p, double* q, double* objective) {
  Problem problem{clients, PackedGram(clients, rank, gram_b, scale),
                  PackedGram(clients, rank, gram_a, nullptr),
                  cross(clients, rank, gram_b, gram_a, weights, scale), 0};
  for (int64_t k = 0; k < clients; ++k) {
    problem.total += weights[k] * problem.m[k * clients + k];
  }
  Descent descents[2];
  descents[0].p.assign(weights, weights + clients);
  descents[1].p.assign(static_cast<size_t>(clients), 0.0);
  descents[1].p[dominant(clients, rank, gram_b, gram_a, weights, scale)] = 1;
  for (Descent& descent : descents) {
    descent.q = descent.p;
    if (std::isfinite(problem.total)) {
      descent.run(problem, options);
    } else {
      descent.objective = {problem.total};
    }
  }

  objective[0] = descents[0].objective[0];
  for (int64_t i = 1; i <= options.max_sweeps; ++i) {
    objective[i] = objective[i - 1];
    for (const Descent& descent : descents) {
      const int64_t last = static_cast<int64_t>(descent.objective.size()) - 1;
      objective[i] = std::min(objective[i], descent.objective[std::min(i, last)]);
    }
  }
  const Descent& best = descents[descents[1].best() < descents[0].best() ? 1 : 0];
  const double norm_p = norm(best.p);
  const double norm_q = norm(best.q);
  const double balance = norm_p > 0 && norm_q > 0 ? std::sqrt(norm_p / norm_q) : 1;
  for (int64_t k = 0; k < clients; ++k) {
    p[k] = best.p[k] / balance;
    q[k] = best.q[k] * balance;
  }
}

}  // namespace fedlora
