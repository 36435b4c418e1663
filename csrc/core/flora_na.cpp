#include "flora_na.h"

#include <vector>

#include "gram.h"
#include "memory.h"
#include "parallel.h"
#include "weighted_sum.h"

namespace fedlora {
namespace {

void average(const Factors& x, int64_t clients, const double* weights, int threads, void* out) {
  const int64_t rank = x.rank / clients;
  std::vector<const void*> sources;
  std::vector<int64_t> strides;
  for (int64_t k = 0; k < clients; ++k) {
    const Part& part = x.parts[x.count == clients ? k : 0];
    const int64_t inside = x.count == clients ? 0 : k * rank;
    sources.push_back(x.rows ? x.at(part, inside, 0) : x.at(part, 0, inside));
    strides.push_back(part.stride);
  }
  const Runs runs{sources.data(), strides.data(), clients, x.rows ? rank : x.depth,
                  x.rows ? x.depth : rank};
  weighted_sum(x.dtype, runs, weights, threads, out);
}

}  // namespace

void flora_na(const Factors& b, const Factors& a, int64_t clients, const double* weights,
              const double* scale, bool fast, const SurrogateOptions& options, int threads,
              const FloraNaResult& result) {
  {
    const Buffer<double> gram_b(b.rank * b.rank);
    const Buffer<double> gram_a(a.rank * a.rank);
    parallel_for(2, team(gram_nanoseconds(b) + gram_nanoseconds(a), threads), [&](int64_t side) {
      gram(side == 0 ? b : a, fast, threads / 2, (side == 0 ? gram_b : gram_a).get());
    });
    surrogate(clients, b.rank / clients, gram_b.get(), gram_a.get(), weights, scale, options,
              result.p, result.q, result.objective);
  }
  std::vector<double> mixing(static_cast<size_t>(clients));
  for (int64_t k = 0; k < clients; ++k) mixing[k] = result.q[k] * scale[k];
  average(b, clients, mixing.data(), threads, result.b_hat);
  average(a, clients, result.p, threads, result.a_hat);
}

}  // namespace fedlora
