// stacked_svd: gram, spectrum, rank and combine back to back, at every shape: where R >= min(m, n)
// the pivoted Cholesky of the smaller side stops at its rank.
//
// Memory: four [L, R, R] float64 between the passes, beside what the stages need for themselves.
#include <algorithm>
#include <limits>

#include "combine.h"
#include "gram/gram.h"
#include "rank.h"
#include "spectrum/spectrum.h"
#include "stacked_svd.h"
#include "workspace.h"

namespace fedlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr double kSingleEps = std::numeric_limits<float>::epsilon();

// What lies between the two passes over the adapters.
struct Middle {
  Middle(const Factors& b, const Factors& a, bool fast, Stream stream, Workspace& workspace)
      : gram_b(workspace.take<double>(b.modules * b.rank * b.rank)),
        gram_a(workspace.take<double>(b.modules * b.rank * b.rank)),
        left(workspace.take<double>(b.modules * b.rank * b.rank)),
        right(workspace.take<double>(b.modules * b.rank * b.rank)),
        total(workspace.take<double>(b.modules)),
        info(workspace.take<int64_t>(b.modules)),
        // The stages follow each other in one stream and share what each needs for itself.
        scratch(workspace.take_bytes(std::max({gram_workspace(b, fast), gram_workspace(a, fast),
                                               spectrum_workspace(b.modules, b.rank, stream)}))) {}

  double* gram_b;
  double* gram_a;
  double* left;
  double* right;
  double* total;
  int64_t* info;
  void* scratch;
};

// Nothing waits for the device, so a module without an answer says so in its singular values.
__global__ void __launch_bounds__(kThreads)
    mark_unsolved(int64_t modules, int64_t rank, const int64_t* info, double* sigma) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < modules * rank && info[i / rank] != 0) sigma[i] = nan("");
}

}  // namespace

size_t stacked_svd_workspace(const Factors& b, const Factors& a, const SvdOptions& options,
                             Stream stream) {
  Workspace workspace;
  Middle(b, a, options.fast, stream, workspace);
  return workspace.used();
}

void stacked_svd(const Factors& b, const Factors& a, const double* scale, const SvdOptions& options,
                 const SvdResult& result, void* workspace, Stream stream) {
  const int64_t modules = b.modules;
  const int64_t rank = b.rank;
  Workspace memory(workspace);
  const Middle at(b, a, options.fast, stream, memory);
  gram(b, options.fast, at.gram_b, at.scratch, stream);
  gram(a, options.fast, at.gram_a, at.scratch, stream);

  // The eigensolver shifts by four times this: by the floor under which sigma^2 is dropped below,
  // so that no direction above the floor counts as rounding there.
  const bool rounded = options.fast && b.dtype != DType::fp64;
  const SpectrumOptions wanted = {options.energy, options.width, rounded ? kSingleEps / 64 : 0};
  spectrum(modules, rank, at.gram_b, at.gram_a, scale, wanted,
           {result.sigma, at.total, at.left, at.right, at.info}, at.scratch, stream);
  const int64_t columns = std::min(rank, options.width);
  if (options.fast) {
    drop_single_noise(modules, rank, at.gram_b, at.gram_a, scale, result.sigma, stream);
    right_of_left(modules, rank, columns, result.sigma, at.left, at.gram_b, scale, at.right,
                  stream);
  }
  if (const int64_t values = modules * rank; values > 0) {
    launch(mark_unsolved, dim3(static_cast<unsigned>((values + kThreads - 1) / kThreads)), kThreads,
           0, stream, modules, rank, at.info, result.sigma);
  }
  select_rank(modules, rank, result.sigma, at.total, options.energy, options.width, result.ranks,
              stream);
  combine(b, {at.left, rank * rank, rank, 1, columns, result.ranks}, options.width, result.b_g,
          stream);
  combine(a, {at.right, rank * rank, 1, rank, columns, result.ranks}, options.width, result.a_g,
          stream);
}

}  // namespace fedlora::cuda
