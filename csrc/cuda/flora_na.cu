// flora_na: the clients' factors are read twice and never copied; what lies between is K x K.
#include <algorithm>

#include "flora_na.h"
#include "gram/gram.h"
#include "surrogate/surrogate.h"
#include "weighted_sum.h"
#include "workspace.h"

namespace fedlora::cuda {
namespace {

constexpr int kThreads = 128;

struct Middle {
  Middle(const Factors& b, const Factors& a, int64_t clients, bool fast,
         const SurrogateOptions& options, Workspace& workspace)
      : gram_b(workspace.take<double>(b.modules * b.rank * b.rank)),
        gram_a(workspace.take<double>(b.modules * b.rank * b.rank)),
        sources(workspace.take<Source>(2 * b.modules * clients)),
        scratch(workspace.take_bytes(std::max(
            {gram_workspace(b, fast), gram_workspace(a, fast),
             surrogate_workspace(b.modules, clients, b.rank / clients, options.max_sweeps)}))) {}

  double* gram_b;
  double* gram_a;
  Source* sources;
  void* scratch;
};

// The pieces of a list as sources of a sum.
__global__ void __launch_bounds__(kThreads)
    sources_of(const Piece* pieces, int64_t count, Source* sources) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) sources[i] = {pieces[i].data, pieces[i].stride};
}

void average(const Factors& x, int64_t clients, const Weights& weights, Source* table, void* out,
             Stream stream) {
  const int64_t rank = x.rank / clients;
  Sources sources = {x.dtype,
                     x.modules,
                     clients,
                     x.rows ? rank : x.depth,
                     x.rows ? x.depth : rank,
                     x.data,
                     x.module_stride,
                     x.rows ? rank * x.stride : rank,
                     x.stride,
                     nullptr};
  const int64_t count = x.modules * clients;
  if (x.pieces != nullptr && count > 0) {
    launch(sources_of, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), kThreads, 0,
           stream, x.pieces, count, table);
    sources.table = table;
  }
  weighted_sum(sources, weights, out, stream);
}

}  // namespace

size_t flora_na_workspace(const Factors& b, const Factors& a, int64_t clients, bool fast,
                          const SurrogateOptions& options) {
  Workspace workspace;
  Middle(b, a, clients, fast, options, workspace);
  return workspace.used();
}

void flora_na(const Factors& b, const Factors& a, int64_t clients, const double* weights,
              const double* scale, bool fast, const SurrogateOptions& options,
              const FloraNaResult& result, void* workspace, Stream stream) {
  Workspace memory(workspace);
  const Middle at(b, a, clients, fast, options, memory);
  gram(b, fast, at.gram_b, at.scratch, stream);
  gram(a, fast, at.gram_a, at.scratch, stream);
  surrogate(b.modules, clients, b.rank / clients, at.gram_b, at.gram_a, weights, scale, options,
            result.p, result.q, result.objective, at.scratch, stream);
  average(b, clients, {result.q, clients, scale}, at.sources, result.b_hat, stream);
  average(a, clients, {result.p, clients}, at.sources + b.modules * clients, result.a_hat, stream);
}

}  // namespace fedlora::cuda
