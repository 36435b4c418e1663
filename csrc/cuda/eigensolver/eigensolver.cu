// Formula and choice of solver: eigensolver.h.
//
// Layout     matrices column-major, column c of module l at (l R + c) R; everything float64.
// Shared     G [n, n], diagonal, partial sums (R <= 168 of 227 KB); G stays in global memory (L2)
//            where it does not fit.
// Scaling    M is divided by a power of four near max(trace, terms): squares of inner products
//            neither overflow nor vanish, and square roots are exact to undo.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/cholesky.cuh"
#include "eigensolver.h"
#include "jacobi.h"
#include "vendor.h"

namespace fedlora::cuda {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();

// Up to which rank Jacobi is used where the vendor's solver could be. Predicted for 224 modules at
// R = 320: 36 ms in clusters, 10 to 30 by the vendor's solver.
struct Limit {
  int capability;  // and later ones up to the next row's
  int64_t jacobi_to;
  const char* source;
};
constexpr Limit kLimits[] = {{80, 168, "table for sm_80, predicted"},
                             {90, 168, "table for sm_90, predicted"},
                             {100, 168, "table for sm_100, predicted"}};

const Limit& limit_of(int capability) {
  const Limit* found = kLimits;
  for (const Limit& limit : kLimits) {
    if (limit.capability <= capability) found = &limit;
  }
  return *found;
}

ShiftedFactor shifted_in(const Eigenproblem& problem) {
  auto* shift = static_cast<double*>(problem.workspace);
  auto* exponent = reinterpret_cast<int*>(shift + problem.modules);
  return {shift, exponent, exponent + problem.modules};
}

size_t state_bytes(int64_t modules) {
  const size_t bytes = static_cast<size_t>(modules) * (sizeof(double) + 2 * sizeof(int));
  return (bytes + 255) / 256 * 256;
}

// Trace, scale and shift of one module's M, the same in every thread; false where M is not finite.
struct Prepared {
  double trace;
  double scale;
  double shift;
  int exponent;
  bool finite;
};

__device__ Prepared prepare(int rank, int size, const double* matrix, double terms, double noise) {
  const auto stride = static_cast<int64_t>(rank) + 1;
  Prepared result{};
  result.trace = warp_sum(size, [&](int i) { return matrix[i * stride]; });
  const double largest = fmax(result.trace, terms);
  result.finite = isfinite(result.trace + terms) != 0;
  if (!result.finite || largest <= 0) return result;
  const int exponent = ilogb(largest) / 2 * 2;
  result.exponent = exponent < kLeastExponent ? kLeastExponent : exponent;
  result.scale = ldexp(1.0, -result.exponent);
  const double share = kShift * fmax(rank * kEps, noise);
  result.shift = share * largest * result.scale;
  return result;
}

// G of M + t I, in global memory; one block a module.
__global__ void __launch_bounds__(kFactorThreads, 1)
    factor_shifted(Eigenproblem problem, ShiftedFactor shifted, Panel panel) {
  const int module = static_cast<int>(blockIdx.x);
  if (problem.solved != nullptr && problem.solved[module] != 0) return;
  const int rank = static_cast<int>(problem.rank);
  const int size = problem.sizes[module];
  const int64_t square = problem.rank * problem.rank;
  double* matrix = problem.matrix + module * square;
  double* factor = problem.factor + module * square;
  double* diagonal = shared_memory<double>();
  double* partial = diagonal + rank;
  const int rows = (rank + 31) / 32 * 32;
  double* l = partial + (rows > kFactorThreads ? rows : kFactorThreads);

  const Prepared found = prepare(rank, size, matrix, problem.terms[module], problem.noise);
  const int n = found.finite && found.scale > 0 ? size : 0;
  const int64_t step = problem.rank + 1;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    diagonal[i] = matrix[i * step] * found.scale + found.shift;
  }
  __syncthreads();
  const int columns = panel_cholesky(
      n, l, panel, diagonal, partial, 0,
      [&](int q, int i) { return matrix[static_cast<int64_t>(q) * rank + i] * found.scale; },
      matrix, factor, rank, [](int, int) {});
  if (threadIdx.x == 0) {
    problem.total_energy[module] = found.finite ? found.trace : nan("");
    problem.info[module] = found.finite ? 0 : 1;
    shifted.shift[module] = found.shift;
    shifted.exponent[module] = found.exponent;
    shifted.columns[module] = columns;
  }
}

// What the vendor's solver is given: M where it is finite, else zeros.
__global__ void __launch_bounds__(kFactorThreads, 1) check_finite(Eigenproblem problem) {
  const int module = static_cast<int>(blockIdx.x);
  if (problem.solved != nullptr && problem.solved[module] != 0) return;
  const int64_t square = problem.rank * problem.rank;
  double* matrix = problem.matrix + module * square;
  const Prepared found = prepare(static_cast<int>(problem.rank), problem.sizes[module], matrix,
                                 problem.terms[module], problem.noise);
  if (threadIdx.x == 0) {
    problem.total_energy[module] = found.finite ? found.trace : nan("");
    problem.info[module] = found.finite ? 0 : 1;
  }
  __syncthreads();
  if (found.finite) return;
  for (int64_t i = threadIdx.x; i < square; i += blockDim.x) matrix[i] = 0;
}

// Eigenvalues ascending in sigma, vectors in the columns of matrix: turned round in place, and the
// negligible ones to zero.
__global__ void __launch_bounds__(kFactorThreads, 1)
    descending(Eigenproblem problem, const int* info) {
  const int module = static_cast<int>(blockIdx.x);
  if (problem.solved != nullptr && problem.solved[module] != 0) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int64_t rank = problem.rank;
  double* matrix = problem.matrix + module * rank * rank;
  double* values = problem.sigma + module * rank;
  const double largest = fmax(values[rank - 1], problem.terms[module]);
  const double floor = static_cast<double>(rank) * kEps * largest;
  const bool converged = info[module] == 0;
  __syncthreads();
  for (int64_t place = thread; place < rank / 2 * rank; place += threads) {
    const int64_t other = (rank - 1 - place / rank) * rank + place % rank;
    const double value = matrix[place];
    matrix[place] = matrix[other];
    matrix[other] = value;
  }
  for (int64_t i = thread; i < (rank + 1) / 2; i += threads) {
    const double low = values[i];
    const double high = values[rank - 1 - i];
    values[i] = converged && high > floor ? sqrt(high) : 0;
    if (i != rank - 1 - i) values[rank - 1 - i] = converged && low > floor ? sqrt(low) : 0;
  }
  __syncthreads();
  if (thread == 0) {
    int count = 0;
    while (count < rank && values[count] > 0) ++count;
    problem.count[module] = count;
    if (!converged) problem.info[module] = 1;
  }
}

void solve_by_vendor(const Eigenproblem& problem, Stream stream) {
  const auto modules = static_cast<unsigned>(problem.modules);
  auto* info = static_cast<int*>(problem.workspace);
  launch(check_finite, dim3(modules), kFactorThreads, 0, stream, problem);
  void* memory = static_cast<char*>(problem.workspace) + state_bytes(problem.modules);
  vendor::symmetric_eigen(problem.modules, problem.rank, problem.solved, problem.matrix,
                          problem.sigma, info, memory, stream);
  launch(descending, dim3(modules), kFactorThreads, 0, stream, problem, info);
}

}  // namespace

Eigensolver eigensolver_of(int64_t rank, bool captured) {
  const Limit& limit = limit_of(device().capability);
  if (rank > limit.jacobi_to && !captured) return {0, limit.source};
  const int blocks = jacobi_blocks(rank);
  if (blocks == 0) return {0, "what shared memory holds"};
  return {blocks, rank <= limit.jacobi_to ? limit.source : "a captured stream"};
}

size_t eigensolver_workspace(int64_t modules, int64_t rank, bool captured) {
  if (eigensolver_of(rank, captured).blocks > 0) return state_bytes(modules);
  if (captured) {
    throw std::runtime_error("a stacked rank of " + std::to_string(rank) +
                             " needs cuSOLVER, which cannot be captured into a CUDA graph");
  }
  return state_bytes(modules) + vendor::symmetric_eigen_workspace(modules, rank);
}

void solve_eigenproblem(const Eigenproblem& problem, Stream stream) {
  const int64_t rank = problem.rank;
  const Eigensolver solver = eigensolver_of(rank, is_captured(stream));
  if (solver.blocks == 0) return solve_by_vendor(problem, stream);
  const Panel panel = panel_of(rank, 1);
  launch(factor_shifted, dim3(static_cast<unsigned>(problem.modules)), kFactorThreads,
         factor_shared(rank, 1, panel), stream, problem, shifted_in(problem), panel);
  rotate_columns(problem, shifted_in(problem), solver.blocks, stream);
}

}  // namespace fedlora::cuda
