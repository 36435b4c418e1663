// Formula: spectrum.h. Where a part of the spectrum is enough, leading.h is tried first; then eight
// launches for the modules that it left, nothing comes back to the host (but see vendor.h):
//
//   factor           equilibrate, L of T D G_A D T           one block a module
//   multiply         H = T^+ G_B T^+ L, M = L^T H            tiles of 64 x 64
//   eigenproblem     W, S (eigensolver.h), two launches      one block or cluster a module
//   keep_wanted      where a part is enough: no others      one warp a module
//   multiply         left = T^+ L W                         only of singular values that are left
//   solve_right      right = W^T L^- T D                     one block per 32 columns of W
//
// Layout     Grams and right row-major, left too; L, H, M and W column-major with leading dimension
//            R, the rows of L in the stack's order and zero above each pivot's.
// Precision  float64.
// Shared     factor: R numbers twice, partial sums, L [R, R] where it fits (R <= 167 of 227 KB),
// else
//            a panel of it (32 columns to R = 800); what is left of the matrix lies where M will.
#include <algorithm>
#include <limits>

#include "coefficients.h"
#include "cuda/cholesky.cuh"
#include "cuda/eigensolver/eigensolver.h"
#include "cuda/rank.cuh"
#include "leading.h"
#include "product.h"
#include "spectrum.h"

namespace fedlora::cuda {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();

// Scratch memory of one call, in one piece.
struct Scratch {
  double* row;      // [L, R] diagonal of T D
  double* inverse;  // [L, R] diagonal of T^+
  double* terms;    // [L] sum_i D_i^2 G_B,ii G_A,ii
  double* lower;    // [L, R, R] L
  double* core;     // [L, R, R] M, then W
  int* pivot;       // [L, R]
  int* kept;        // [L] columns of L
  int* count;       // [L] singular values that are not zero
  int* solved;      // [L] whether the leading part was enough
  void* eigensolver;
  size_t bytes;

  Scratch(int64_t modules, int64_t rank, void* memory) {
    auto* at = static_cast<char*>(memory);
    size_t used = 0;
    const auto take = [&](int64_t elements, size_t size) {
      char* place = at == nullptr ? nullptr : at + used;
      used += (static_cast<size_t>(elements) * size + 255) / 256 * 256;
      return static_cast<void*>(place);
    };
    row = static_cast<double*>(take(modules * rank, sizeof(double)));
    inverse = static_cast<double*>(take(modules * rank, sizeof(double)));
    terms = static_cast<double*>(take(modules, sizeof(double)));
    lower = static_cast<double*>(take(modules * rank * rank, sizeof(double)));
    core = static_cast<double*>(take(modules * rank * rank, sizeof(double)));
    pivot = static_cast<int*>(take(modules * rank, sizeof(int)));
    kept = static_cast<int*>(take(modules, sizeof(int)));
    count = static_cast<int*>(take(modules, sizeof(int)));
    solved = static_cast<int*>(take(modules, sizeof(int)));
    eigensolver = at == nullptr ? nullptr : at + used;
    bytes = used;
  }
};

struct Factoring {
  int rank;
  const double* gram_b;
  const double* gram_a;
  const double* scale;
  double noise;
  Panel panel;
  const int* solved;  // [L] what to leave alone, or null
  Scratch scratch;
};

__device__ inline double root_of(double square) { return sqrt(fmax(square, 0.0)); }

__global__ void __launch_bounds__(kFactorThreads, 1) factor(Factoring task) {
  const int64_t module = blockIdx.x;
  if (task.solved != nullptr && task.solved[module] != 0) return;
  const int rank = task.rank;
  const int64_t square = static_cast<int64_t>(rank) * rank;
  const int64_t step = static_cast<int64_t>(rank) + 1;
  const int64_t vector = module * rank;
  const double* gram_b = task.gram_b + module * square;
  const double* gram_a = task.gram_a + module * square;
  const double* scale = task.scale + vector;
  double* lower = task.scratch.lower + module * square;
  int* pivot = task.scratch.pivot + vector;
  double* row = shared_memory<double>();
  double* diagonal = row + rank;
  double* partial = diagonal + rank;
  const int rows = (rank + 31) / 32 * 32;
  double* l = partial + (rows > kFactorThreads ? rows : kFactorThreads);

  const double terms = terms_of(rank, gram_b, gram_a, scale);
  for (int i = static_cast<int>(threadIdx.x); i < rank; i += static_cast<int>(blockDim.x)) {
    const double norm_b = root_of(gram_b[i * step]);
    const double norm_a = root_of(gram_a[i * step]) * fabs(scale[i]);
    const bool present = norm_b > 0 && norm_a > 0;
    row[i] = present ? sqrt(norm_b / norm_a) * scale[i] : 0;
    diagonal[i] = row[i] * gram_a[i * step] * row[i];
    task.scratch.row[vector + i] = row[i];
    task.scratch.inverse[vector + i] = present ? sqrt(norm_a / norm_b) : 0;
  }
  __syncthreads();
  const double largest = diagonal[warp_argmax(rank, diagonal)];
  const double tolerance = fmax(rank * kEps, task.noise) * largest;
  __syncthreads();
  const int kept = panel_cholesky(
      isfinite(terms) ? rank : 0, l, task.panel, diagonal, partial, tolerance,
      [&](int q, int i) { return row[i] * gram_a[static_cast<int64_t>(q) * rank + i] * row[q]; },
      task.scratch.core + module * square, lower, rank, [&](int j, int q) { pivot[j] = q; });
  if (threadIdx.x == 0) {
    task.scratch.terms[module] = terms;
    task.scratch.kept[module] = kept;
  }
}

// Singular values that nobody asked for are left at zero, as the leading part leaves them, so that
// no coefficients are computed for them.
__global__ void __launch_bounds__(32)
    keep_wanted(int64_t rank, double energy, int64_t cap, const Spectra out, int* count,
                const int* solved) {
  const int64_t module = blockIdx.x;
  if (solved != nullptr && solved[module] != 0) return;
  double* sigma = out.sigma + module * rank;
  const int64_t p = rank_of(rank, sigma, out.total_energy[module], energy, cap);
  __syncwarp();
  for (int64_t i = p + threadIdx.x; i < rank; i += 32) sigma[i] = 0;
  if (threadIdx.x == 0 && count[module] > p) count[module] = static_cast<int>(p);
}

// What is left to say about modules without ranks.
__global__ void __launch_bounds__(kFactorThreads)
    no_ranks(int64_t modules, double* total_energy, int64_t* info) {
  const int64_t module = static_cast<int64_t>(blockIdx.x) * kFactorThreads + threadIdx.x;
  if (module < modules) total_energy[module] = 0, info[module] = 0;
}

}  // namespace

size_t spectrum_workspace(int64_t modules, int64_t rank, Stream stream) {
  return Scratch(modules, rank, nullptr).bytes +
         eigensolver_workspace(modules, rank, is_captured(stream));
}

void spectrum(int64_t modules, int64_t rank, const double* gram_b, const double* gram_a,
              const double* scale, const SpectrumOptions& options, const Spectra& out,
              void* workspace, Stream stream) {
  if (modules == 0) return;
  if (rank == 0) {
    const int64_t blocks = (modules + kFactorThreads - 1) / kFactorThreads;
    return launch(no_ranks, dim3(static_cast<unsigned>(blocks)), kFactorThreads, 0, stream, modules,
                  out.total_energy, out.info);
  }
  const Scratch scratch(modules, rank, workspace);
  const auto blocks = static_cast<unsigned>(modules);
  const auto r = static_cast<int>(rank);
  const int64_t square = rank * rank;
  const int* solved = nullptr;
  if (const auto attempts = leading_attempts(rank, options); !attempts.empty()) {
    leading(modules, rank, attempts, gram_b, gram_a, scale, options, out, scratch.solved,
            {scratch.core, scratch.lower}, stream);
    solved = scratch.solved;
  }
  const Panel panel = panel_of(rank, 2);
  launch(factor, dim3(blocks), kFactorThreads, factor_shared(rank, 2, panel), stream,
         Factoring{r, gram_b, gram_a, scale, options.noise, panel, solved, scratch});

  // H lies in left until left itself is known, G of the eigensolver in right.
  Product product = {.modules = modules,
                     .rows = r,
                     .columns = r,
                     .depth = r,
                     .a = {gram_b, square, r, 1},
                     .b = {scratch.lower, square, 1, r},
                     .c = {out.left, square, 1, r},
                     .kept_rows = nullptr,
                     .kept_columns = scratch.kept,
                     .kept_depth = nullptr,
                     .row_factor = scratch.inverse,
                     .depth_factor = scratch.inverse,
                     .column_factor = nullptr,
                     .inverse_squares = false,
                     .factor_stride = rank,
                     .solved = solved};
  multiply(product, stream);
  product.a = {scratch.lower, square, r, 1};
  product.b = {out.left, square, 1, r};
  product.c = {scratch.core, square, 1, r};
  product.kept_rows = scratch.kept;
  product.row_factor = product.depth_factor = nullptr;
  multiply(product, stream);

  solve_eigenproblem({.modules = modules,
                      .rank = rank,
                      .sizes = scratch.kept,
                      .terms = scratch.terms,
                      .noise = options.noise,
                      .matrix = scratch.core,
                      .factor = out.right,
                      .sigma = out.sigma,
                      .count = scratch.count,
                      .total_energy = out.total_energy,
                      .info = out.info,
                      .solved = solved,
                      .workspace = scratch.eigensolver},
                     stream);
  if (options.energy < 1 || (options.cap > 0 && options.cap < rank)) {
    launch(keep_wanted, dim3(blocks), 32, 0, stream, rank, options.energy,
           options.cap > 0 ? options.cap : rank, out, scratch.count, solved);
  }

  product.a = {scratch.lower, square, 1, r};
  product.b = {scratch.core, square, 1, r};
  product.c = {out.left, square, r, 1};
  product.kept_rows = nullptr;
  product.kept_columns = scratch.count;
  product.kept_depth = scratch.kept;
  product.row_factor = scratch.inverse;
  multiply(product, stream);

  solve_right({.modules = modules,
               .rank = r,
               .row = scratch.row,
               .lower = scratch.lower,
               .vectors = scratch.core,
               .pivot = scratch.pivot,
               .kept = scratch.kept,
               .count = scratch.count,
               .right = out.right,
               .solved = solved},
              stream);
}

}  // namespace fedlora::cuda
