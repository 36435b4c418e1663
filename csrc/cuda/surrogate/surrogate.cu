// Formula: core/surrogate.h. Four launches: the packed Grams, M (both problem.h), every
// sweep of both starts, a block of threads each, and the better of the two.
//
// Layout     packed Grams [pairs, entries] per module; S and its steps [entries]; all else as in
//            core/surrogate.h.
// Precision  float64; sums in one fixed order.
// Shared     plan.h: all of it for K = 10, r = 16 (131 KB, 120 of them the packed Grams);
//            the packed Grams stay in global memory (L2) from K = 14, r = 16 on.
#include "descent.cuh"
#include "problem.h"
#include "surrogate.h"

namespace fedlora::cuda {
namespace {

constexpr int kStarts = 2;
constexpr int kFinishThreads = 64;

__global__ void __launch_bounds__(kDescentThreads, 1) descend(Descending task) {
  const int64_t module = blockIdx.x;
  const int start = static_cast<int>(blockIdx.y);
  const int64_t own = module * kStarts + start;
  Descent descent(task, module, own);
  descent.start(start == 1);
  descent.run(task.max_sweeps, task.tolerance, task.objective + own * (task.max_sweeps + 1));
  const int clients = task.problem.clients;
  descent.store(task.p + own * clients, task.q + own * clients);
}

// The better of the two, with ||p|| = ||q||; f is FedIT's at first, then the lower one after each
// sweep.
__global__ void __launch_bounds__(kFinishThreads)
    finish(Descending task, double* p, double* q, double* objective) {
  const int64_t module = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int clients = task.problem.clients;
  const int steps = task.max_sweeps + 1;
  const double* first = task.objective + module * kStarts * steps;
  const double* second = first + steps;
  for (int i = thread; i < steps; i += kFinishThreads) {
    objective[module * steps + i] = i > 0 && second[i] < first[i] ? second[i] : first[i];
  }
  const int64_t best = module * kStarts + (second[steps - 1] < first[steps - 1] ? 1 : 0);
  const double* from_p = task.p + best * clients;
  const double* from_q = task.q + best * clients;
  const double norm_p = sqrt(warp_sum(clients, [&](int k) { return from_p[k] * from_p[k]; }));
  const double norm_q = sqrt(warp_sum(clients, [&](int k) { return from_q[k] * from_q[k]; }));
  const double balance = norm_p > 0 && norm_q > 0 ? sqrt(norm_p / norm_q) : 1;
  for (int k = thread; k < clients; k += kFinishThreads) {
    p[module * clients + k] = from_p[k] / balance;
    q[module * clients + k] = from_q[k] * balance;
  }
}

// Everything in one piece; the size alone where memory is null.
struct Memory {
  double* packed_b;
  double* packed_a;
  double* cross;
  double* blocks;
  double* p;
  double* q;
  double* objective;
  size_t bytes;

  Memory(int64_t modules, int64_t clients, int64_t rank, int64_t max_sweeps, void* memory) {
    const DescentPlan plan(clients, rank);
    const int64_t gram = clients * (clients + 1) / 2 * (rank * (rank + 1) / 2);
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      double* place = memory == nullptr ? nullptr : static_cast<double*>(memory) + used;
      used += modules * count;
      return place;
    };
    packed_b = take(gram);
    packed_a = take(gram);
    cross = take(clients * clients);
    blocks = take(kStarts * plan.global_size);
    p = take(kStarts * clients);
    q = take(kStarts * clients);
    objective = take(kStarts * (max_sweeps + 1));
    bytes = static_cast<size_t>(used) * sizeof(double);
  }
};

}  // namespace

size_t surrogate_workspace(int64_t modules, int64_t clients, int64_t rank, int64_t max_sweeps) {
  return Memory(modules, clients, rank, max_sweeps, nullptr).bytes;
}

void surrogate(int64_t modules, int64_t clients, int64_t rank, const double* gram_b,
               const double* gram_a, const double* weights, const double* scale,
               const SurrogateOptions& options, double* p, double* q, double* objective,
               void* workspace, Stream stream) {
  if (modules == 0) return;
  const Memory memory(modules, clients, rank, options.max_sweeps, workspace);
  const SurrogateProblem problem = {static_cast<int>(modules),
                                    static_cast<int>(clients),
                                    static_cast<int>(rank),
                                    gram_b,
                                    gram_a,
                                    weights,
                                    scale,
                                    memory.packed_b,
                                    memory.packed_a,
                                    memory.cross};
  prepare_surrogate(problem, stream);
  const Descending task = {problem,
                           DescentPlan(clients, rank),
                           static_cast<int>(options.max_sweeps),
                           options.tolerance,
                           memory.blocks,
                           memory.p,
                           memory.q,
                           memory.objective};
  const auto blocks = static_cast<unsigned>(modules);
  launch(descend, dim3(blocks, kStarts), kDescentThreads,
         static_cast<size_t>(task.plan.shared_size) * sizeof(double), stream, task);
  launch(finish, dim3(blocks), kFinishThreads, 0, stream, task, p, q, objective);
}

}  // namespace fedlora::cuda
