// One module's descents by one block of threads: alternating least squares that looks further along
// each sweep (core/surrogate.h has the formulas).
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "plan.h"
#include "problem.h"
#include "solve.cuh"

namespace fedlora::cuda {

constexpr int kLooks = 4;  // the sweep's end and three points beyond it, in sweeps

__device__ inline double look(int index) {
  return index == 0 ? 0 : index == 1 ? 2 : index == 2 ? 5 : 15;
}

struct Descending {
  SurrogateProblem problem;
  DescentPlan plan;
  int max_sweeps;
  double tolerance;
  double* memory;     // [L, starts, plan.global_size]
  double* p;          // [L, starts, K]
  double* q;          // [L, starts, K]
  double* objective;  // [L, starts, max_sweeps + 1]
};

// Mixing weights with their quadratics.
struct MixingPoint {
  double* p;
  double* q;
  double* s_a;
  double* s_b;
};

// One start of one module, by one block of threads: `own` of all of them.
class Descent {
 public:
  __device__ Descent(const Descending& task, int64_t module, int64_t own)
      : clients_(task.problem.clients),
        pairs_count_(task.problem.pairs()),
        entries_(task.problem.entries()),
        thread_(static_cast<int>(threadIdx.x)) {
    const DescentPlan& plan = task.plan;
    double* shared = shared_memory<double>();
    double* global = task.memory + own * plan.global_size;
    const int64_t packed_size = static_cast<int64_t>(pairs_count_) * entries_;
    double* vectors = plan.weights.in<double>(shared, global);
    double* s = plan.quadratic.in<double>(shared, global);
    here_ = {vectors, vectors + clients_, s, s + entries_};
    next_ = {vectors + 2 * clients_, vectors + 3 * clients_, s + 2 * entries_, s + 3 * entries_};
    step_ = {vectors + 4 * clients_, vectors + 5 * clients_, s + 4 * entries_, s + 5 * entries_};
    partial_ = plan.partial.in<double>(shared, global);
    pairs_ = plan.pairs.in<double>(shared, global);
    double* rest = vectors + 6 * clients_;
    solver_ = {plan.factor.in<double>(shared, global),
               plan.second.in<double>(shared, global),
               rest,
               rest + clients_,
               rest + 2 * clients_,
               rest + 3 * clients_,
               partial_,
               reinterpret_cast<int*>(rest + 4 * clients_),
               reinterpret_cast<int*>(rest + 5 * clients_)};
    cross_ = task.problem.cross + module * clients_ * clients_;
    packed_a_ = place(plan.packed_a, shared, task.problem.packed_a + module * packed_size);
    packed_b_ = place(plan.packed_b, shared, task.problem.packed_b + module * packed_size);
    __syncthreads();

    weights_ = task.problem.weights;
    total_ = warp_sum(clients_, [&](int k) { return weights_[k] * cross_[k * (clients_ + 1)]; });
  }

  // FedIT's start, p = q = w, or the client with the largest update of its own, the first of equal
  // ones.
  __device__ void start(bool dominant) {
    for (int k = thread_ / 32; k < clients_; k += kDescentThreads / 32) {
      const int64_t block = static_cast<int64_t>(packed(clients_, k, k)) * entries_;
      const double square =
          warp_sum(entries_, [&](int i) { return packed_a_[block + i] * packed_b_[block + i]; });
      if (thread_ % 32 == 0) partial_[k] = weights_[k] * sqrt(fmax(square, 0.0));
    }
    __syncthreads();
    const int largest = warp_argmax(clients_, partial_);
    for (int k = thread_; k < clients_; k += kDescentThreads) {
      here_.p[k] = here_.q[k] = !dominant ? weights_[k] : k == largest ? 1 : 0;
    }
    __syncthreads();
  }

  // Sweeps until f falls by no more than the tolerance; objective [max_sweeps + 1] takes f after
  // each, the last one repeated.
  __device__ void run(int max_sweeps, double tolerance, double* objective) {
    int sweeps = 0;
    double best = total_;
    if (isfinite(total_)) {
      measure(here_);
      double values[kLooks];
      evaluate(here_, values, 1);
      best = values[0];
      while (sweeps < max_sweeps) {
        alternate();
        const double now = look_further();
        if (!(now < best)) break;
        if (thread_ == 0) objective[sweeps] = best;
        const double gain = best - now;
        best = now;
        const MixingPoint previous = here_;
        here_ = next_;
        next_ = previous;
        ++sweeps;
        if (!(gain > tolerance * total_)) break;
      }
    }
    for (int i = sweeps + thread_; i <= max_sweeps; i += kDescentThreads) objective[i] = best;
  }

  __device__ void store(double* p, double* q) const {
    for (int k = thread_; k < clients_; k += kDescentThreads) p[k] = here_.p[k], q[k] = here_.q[k];
  }

 private:
  __device__ const double* place(const DescentPlace& where, double* shared,
                                 const double* source) const {
    if (!where.shared) return source;
    double* to = shared + where.offset;
    for (int i = thread_; i < pairs_count_ * entries_; i += kDescentThreads) to[i] = source[i];
    return to;
  }

  // s = S(mixing): the packed Gram's rows summed with the products of the pairs' weights.
  __device__ void quadratic(const double* gram, const double* mixing, double* s) {
    for (int u = thread_ / 32; u < clients_; u += kDescentThreads / 32) {
      for (int v = u + thread_ % 32; v < clients_; v += 32) {
        pairs_[packed(clients_, u, v)] = mixing[u] * mixing[v] * (u == v ? 1 : 2);
      }
    }
    __syncthreads();
    // Few entries, or none: several threads share the pairs of one.
    const int width = entries_ == 0 ? 32 : (entries_ + 31) / 32 * 32;
    const int parts = width < kDescentThreads ? kDescentThreads / width : 1;
    const int stride = parts > 1 ? width : kDescentThreads;
    const int part = parts > 1 ? thread_ / width : 0;
    const int first = parts > 1 ? thread_ % width : thread_;
    for (int entry = first; entry < entries_ && part < parts; entry += stride) {
      double sum = 0;
      for (int pair = part; pair < pairs_count_; pair += parts) {
        sum = fma(pairs_[pair], gram[static_cast<int64_t>(pair) * entries_ + entry], sum);
      }
      if (parts > 1) {
        partial_[part * width + entry] = sum;
      } else {
        s[entry] = sum;
      }
    }
    __syncthreads();
    if (parts == 1) return;
    for (int entry = thread_; entry < entries_; entry += kDescentThreads) {
      double sum = 0;
      for (int other = 0; other < parts; ++other) sum += partial_[other * width + entry];
      s[entry] = sum;
    }
    __syncthreads();
  }

  __device__ void measure(const MixingPoint& point) {
    quadratic(packed_a_, point.p, point.s_a);
    quadratic(packed_b_, point.q, point.s_b);
  }

  // pairs = H_uv = <G^{uv}, s>, a warp a pair.
  __device__ void normal(const double* gram, const double* s) {
    for (int pair = thread_ / 32; pair < pairs_count_; pair += kDescentThreads / 32) {
      const double* row = gram + static_cast<int64_t>(pair) * entries_;
      const double sum = warp_sum(entries_, [&](int i) { return row[i] * s[i]; });
      if (thread_ % 32 == 0) pairs_[pair] = sum;
    }
    __syncthreads();
  }

  // The q-step, q = H^+ M p, then the p-step, p = H^+ M^T q, each with its quadratic.
  __device__ void alternate() {
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      const bool first = step == 0;
      const double* gram = first ? packed_b_ : packed_a_;
      const double* from = first ? here_.p : next_.q;
      double* to = first ? next_.q : next_.p;
      const int row = first ? clients_ : 1;
      const int column = first ? 1 : clients_;
      normal(gram, first ? here_.s_a : next_.s_b);
      for (int u = thread_ / 32; u < clients_; u += kDescentThreads / 32) {
        const double sum =
            warp_sum(clients_, [&](int v) { return cross_[u * row + v * column] * from[v]; });
        if (thread_ % 32 == 0) to[u] = sum;
      }
      __syncthreads();
      least_norm_solve(clients_, pairs_, to, solver_);
      quadratic(gram, to, first ? next_.s_b : next_.s_a);
    }
  }

  // f at `point` and beyond it along step_; the same in every thread.
  __device__ void evaluate(const MixingPoint& point, double (&values)[kLooks], int count) {
    double sums[kLooks] = {};
    for (int place = thread_; place < clients_ * clients_; place += kDescentThreads) {
      const int u = place / clients_;
      const int v = place % clients_;
      const double m = cross_[place];
      for (int i = 0; i < count; ++i) {
        const double q = i == 0 ? point.q[u] : point.q[u] + look(i) * step_.q[u];
        const double p = i == 0 ? point.p[v] : point.p[v] + look(i) * step_.p[v];
        sums[i] -= 2 * q * m * p;
      }
    }
    // With d = next - here, S(next + t d) = S(next) + t (S(next) + (1 + t) S(d) - S(here)).
    for (int i = thread_; i < entries_; i += kDescentThreads) {
      for (int k = 0; k < count; ++k) {
        const double t = look(k);
        double s_a = point.s_a[i];
        double s_b = point.s_b[i];
        if (k > 0) {
          s_a += t * (s_a + (1 + t) * step_.s_a[i] - here_.s_a[i]);
          s_b += t * (s_b + (1 + t) * step_.s_b[i] - here_.s_b[i]);
        }
        sums[k] = fma(s_a, s_b, sums[k]);
      }
    }
    for (int k = 0; k < count; ++k) {
      double sum = sums[k];
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (thread_ % 32 == 0) partial_[k * (kDescentThreads / 32) + thread_ / 32] = sum;
    }
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      double sum = 0;
      for (int warp = 0; warp < kDescentThreads / 32; ++warp)
        sum += partial_[k * (kDescentThreads / 32) + warp];
      values[k] = fmax(total_ + sum, 0.0);
    }
    __syncthreads();
  }

  // Moves next_ to the best of the looks along the sweep from here_; f there.
  __device__ double look_further() {
    for (int k = thread_; k < clients_; k += kDescentThreads) {
      step_.p[k] = next_.p[k] - here_.p[k];
      step_.q[k] = next_.q[k] - here_.q[k];
    }
    __syncthreads();
    measure(step_);
    double values[kLooks];
    evaluate(next_, values, kLooks);
    int best = 0;
    double least = values[0];
    for (int k = 1; k < kLooks; ++k) {
      if (values[k] < least) best = k, least = values[k];
    }
    if (best == 0) return least;
    for (int k = thread_; k < clients_; k += kDescentThreads) {
      next_.p[k] += look(best) * step_.p[k];
      next_.q[k] += look(best) * step_.q[k];
    }
    __syncthreads();
    measure(next_);
    evaluate(next_, values, 1);
    return values[0];
  }

  int clients_;
  int pairs_count_;
  int entries_;
  int thread_;
  double total_;
  const double* weights_;
  MixingPoint here_;
  MixingPoint next_;
  MixingPoint step_;
  double* partial_;
  double* pairs_;
  SolveMemory solver_;
  const double* cross_;
  const double* packed_a_;
  const double* packed_b_;
};

}  // namespace fedlora::cuda
