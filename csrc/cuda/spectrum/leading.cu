// Formula: leading.h. One block a module does everything, so a module ends when it is done and no
// decision comes back to the host.
//
// Layout     blocks of vectors row-major [R, kVectors]: all four in shared memory where they fit,
//            else in device memory (they stay in L2) and only the operand of the product at hand
//            copied to shared memory. A warp computes 16 rows of a product with all vectors, and
//            reads a Gram matrix straight from device memory, once.
// Precision  float64 on tensor cores; C divided by a power of four near its trace.
// Shared     two matrices [kVectors, kVectors + 1], partial sums and D; then four blocks of R rows
//            of kVectors + 1 numbers (different banks; 32 vectors: R <= 176 of 227 KB, 128 of 163),
//            or one (32 vectors: R <= 752; 64: 288), or none.
// Work       an iteration takes 4 R^2 kVectors flops in two products and some 12 R kVectors^2
//            beside them, and reads 16 R^2 bytes. Counted for p = 6 (tests/test_cost_spectrum.cpp):
//            11 to 20 MFLOP at R = 128 and 115 to 157 at R = 512, where all pairs take 103 and
//            2281.
#include <algorithm>
#include <limits>

#include "coefficients.h"
#include "cuda/cholesky.cuh"
#include "cuda/eigensolver/rotations.cuh"
#include "cuda/mma.cuh"
#include "leading.h"

namespace fedlora::cuda {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kFew = 32;
constexpr int kMany = 64;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;  // of a tensor-core product
constexpr int kIterations = 8;
constexpr int kSweeps = 30;
constexpr double kPart = 1 - 1e-9;   // of the energy: residuals cannot tell the rest apart
constexpr double kConverged = 1e-8;  // residual over (Th_1 Th_i)^1/2: results err by its square
constexpr double kDependent = 64;    // times R eps: the share of a vector under which it is none
constexpr double kOnce = 0.1;        // pivots after which one orthonormalization is enough
constexpr double kShift = 4;         // as in eigensolver.cu
constexpr int kLeastExponent = -1020;

struct Task {
  int rank;
  const double* gram_b;
  const double* gram_a;
  const double* scale;
  double energy;
  int cap;
  double noise;
  bool again;  // only what an earlier launch left unsolved
  Spectra out;
  int* solved;
  LeadingMemory memory;
};

// What of the blocks of vectors lies in shared memory.
enum class Held { kNone, kOperand, kAll };

constexpr int row_of(int vectors) { return vectors + 1; }

template <int kVectors>
size_t small_shared(int64_t rank) {
  return (2 * static_cast<size_t>(kVectors) * row_of(kVectors) + kThreads + 4 * kVectors +
          static_cast<size_t>(rank)) *
         sizeof(double);
}

template <int kVectors>
size_t shared_bytes(int64_t rank, Held held) {
  const auto rows = static_cast<size_t>((rank + kRows - 1) / kRows * kRows);
  const size_t blocks = held == Held::kAll ? 4 : held == Held::kOperand ? 1 : 0;
  return small_shared<kVectors>(rank) + blocks * rows * row_of(kVectors) * sizeof(double);
}

// Uniform in (-1/2, 1/2), the same for every module.
__device__ inline double start_of(int place) {
  uint64_t bits = (static_cast<uint64_t>(place) + 1) * 0x9E3779B97F4A7C15ULL;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ULL;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBULL;
  return static_cast<double>(bits >> 11) * 0x1p-53 - 0.5;
}

// One module's block of vectors and the threads' part in it.
template <int kVectors, Held kHeld>
class Block {
 public:
  static constexpr int kTiles = kVectors / 8;
  static constexpr int kRow = row_of(kVectors);
  static constexpr int kLine = kHeld == Held::kAll ? kRow : kVectors;  // of a block of vectors

  __device__ Block(int rank, double* shared)
      : s(shared),
        t(s + kVectors * kRow),
        partial(t + kVectors * kRow),
        theta(partial + kThreads),
        residual(theta + kVectors),
        diagonal(residual + kVectors),
        norms(diagonal + kVectors),
        row(norms + kVectors),
        held(row + rank),
        rank_(rank),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(thread_ / 32),
        group_(thread_ % 32 / 4),
        member_(thread_ % 4) {}

  // out[i, c] = unit factor_i sum_k gram[i, k] factor_k in[k, c]; factor may be null for 1.
  __device__ void multiply(const double* gram, const double* factor, double unit, const double* in,
                           double* out) const {
    if constexpr (kHeld == Held::kOperand) {
      const int rows = (rank_ + kRows - 1) / kRows * kRows;
      for (int place = thread_; place < rows * kVectors; place += kThreads) {
        const int k = place / kVectors;
        held[k * kRow + place % kVectors] = k < rank_ ? in[place] * factor_of(factor, k) : 0;
      }
      __syncthreads();
    }
    for (int top = kRows * warp_; top < rank_; top += kRows * kWarps) {
      double sums[kTiles][4] = {};
      double next[8];
      load(gram, top, 0, next);
      for (int start = 0; start < rank_; start += kRows) {
        double a[8], factors[4];
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] = next[i];
        if (start + kRows < rank_) load(gram, top, start + kRows, next);
#pragma unroll
        for (int i = 0; kHeld != Held::kOperand && i < 4; ++i) {
          const int k = start + 4 * member_ + i;
          factors[i] = k < rank_ ? factor_of(factor, k) : 0;
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          double b[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int k = start + 4 * member_ + i;
            const int column = 8 * tile + group_;
            if constexpr (kHeld == Held::kOperand) {
              b[i] = held[k * kRow + column];
            } else {
              b[i] = k < rank_ ? in[k * kLine + column] * factors[i] : 0;
            }
          }
          mma<kRows>(sums[tile], a, b);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = top + group_ + 8 * half;
        if (row >= rank_) continue;
        const double each = unit * factor_of(factor, row);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          double* to = out + row * kLine + 8 * tile + 2 * member_;
          to[0] = sums[tile][2 * half] * each;
          to[1] = sums[tile][2 * half + 1] * each;
        }
      }
    }
    __syncthreads();
  }

  // s = left^T right, which is symmetric: tiles below the diagonal are mirrored.
  __device__ void inner(const double* left, const double* right) const {
    constexpr int kAcross = kVectors / 8;
    for (int place = warp_; place < kVectors / kRows * kAcross; place += kWarps) {
      const int top = place / kAcross * kRows;
      const int first = place % kAcross * 8;
      if (first < top) continue;
      double sums[4] = {};
      for (int start = 0; start < rank_; start += kRows) {
        double a[8], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = start + 4 * member_ + i;
          const bool inside = k < rank_;
          a[2 * i] = inside ? left[k * kLine + top + group_] : 0;
          a[2 * i + 1] = inside ? left[k * kLine + top + group_ + 8] : 0;
          b[i] = inside ? right[k * kLine + first + group_] : 0;
        }
        mma<kRows>(sums, a, b);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        double* to = s + (top + group_ + 8 * half) * kRow + first + 2 * member_;
        to[0] = sums[2 * half];
        to[1] = sums[2 * half + 1];
        if (first < top + kRows) continue;
        double* mirrored = s + (first + 2 * member_) * kRow + top + group_ + 8 * half;
        mirrored[0] = sums[2 * half];
        mirrored[kRow] = sums[2 * half + 1];
      }
    }
    __syncthreads();
  }

  // out = in t; in place too, as a warp reads its 16 rows before it writes them.
  __device__ void transform(const double* in, double* out) const {
    for (int top = kRows * warp_; top < rank_; top += kRows * kWarps) {
      double a[kVectors / kRows][8];
#pragma unroll
      for (int step = 0; step < kVectors / kRows; ++step) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = top + group_ + i % 2 * 8;
          const int k = kRows * step + 4 * member_ + i / 2;
          a[step][i] = row < rank_ ? in[row * kLine + k] : 0;
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile) {
        double sums[4] = {};
#pragma unroll
        for (int step = 0; step < kVectors / kRows; ++step) {
          double b[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            b[i] = t[(kRows * step + 4 * member_ + i) * kRow + 8 * tile + group_];
          }
          mma<kRows>(sums, a[step], b);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = top + group_ + 8 * half;
          if (row >= rank_) continue;
          double* to = out + row * kLine + 8 * tile + 2 * member_;
          to[0] = sums[2 * half];
          to[1] = sums[2 * half + 1];
        }
      }
    }
    __syncthreads();
  }

  // t with t^T s t = I, its columns the pivots' in their order and zeros behind them: pivoted
  // Cholesky of s with unit diagonal, each step also applied to t. Stops where what is left of a
  // vector is rounding. Returns the number of columns; `least` is the smallest pivot of them.
  __device__ int orthonormalize(double tolerance, double& least) const {
    auto* order = reinterpret_cast<int*>(norms);  // the vector's place, -1 before it has one
    double largest = 0;
#pragma unroll 1
    for (int i = 0; i < kVectors; ++i) largest = fmax(largest, s[i * kRow + i]);
    if (thread_ < kVectors) {
      const double square = s[thread_ * kRow + thread_];
      const bool real = square > tolerance * largest;
      diagonal[thread_] = real ? 1 / sqrt(square) : 0;
      order[thread_] = -1;
    }
    __syncthreads();
    for (int place = thread_; place < kVectors * kVectors; place += kThreads) {
      const int i = place / kVectors, k = place % kVectors;
      s[i * kRow + k] *= diagonal[i] * diagonal[k];
      t[i * kRow + k] = i == k ? diagonal[i] : 0;
    }
    if (thread_ < kVectors) residual[thread_] = diagonal[thread_] > 0 ? 1 : 0;
    __syncthreads();
    int size = 0;
    least = 1;
    for (; size < kVectors; ++size) {
      const int q = warp_argmax(kVectors, residual);
      const double pivot = residual[q];
      if (!(pivot > tolerance)) break;
      least = fmin(least, pivot);
      __syncthreads();
      for (int place = thread_; place < kVectors * kVectors; place += kThreads) {
        const int i = place / kVectors, k = place % kVectors;
        if (k == q || order[k] >= 0) continue;
        const double share = s[q * kRow + k] / pivot;
        if (i == q || order[i] >= 0) {
          t[i * kRow + k] = fma(-t[i * kRow + q], share, t[i * kRow + k]);
        } else {
          const double left = fma(-s[q * kRow + i], share, s[i * kRow + k]);
          s[i * kRow + k] = left;
          if (i == k) residual[i] = left;
        }
      }
      __syncthreads();
      if (thread_ == 0) {
        residual[q] = -1;
        order[q] = size;
        theta[q] = 1 / sqrt(pivot);
      }
      __syncthreads();
    }
    for (int place = thread_; place < kVectors * kVectors; place += kThreads) {
      s[place / kVectors * kRow + place % kVectors] = 0;
    }
    __syncthreads();
    for (int place = thread_; place < kVectors * kVectors; place += kThreads) {
      const int i = place / kVectors, k = place % kVectors;
      if (order[k] >= 0) s[i * kRow + order[k]] = t[i * kRow + k] * theta[k];
    }
    __syncthreads();
    take();
    return size;
  }

  // s = t Th t^T of its first `size` rows, Th in theta, descending: one-sided Jacobi on the factor
  // of s + shift I (eigensolver.h), which is nearly diagonal from the second iteration on.
  __device__ bool diagonalize(int size, double shift) const {
    double* columns = t;
    for (int place = thread_; place < kVectors * kVectors; place += kThreads) columns[place] = 0;
    if (thread_ < kVectors) {
      diagonal[thread_] = thread_ < size ? s[thread_ * kRow + thread_] + shift : 0;
    }
    __syncthreads();
    const int found = pivoted_cholesky(
        size, columns, kVectors, diagonal, partial, 0,
        [&](int q, int i) { return s[q * kRow + i]; }, [](int, int, double) {}, [](int, int) {});
    __syncthreads();
    const ColumnPairs<8, kVectors / 8> pairs(columns, kVectors, kVectors, (found + 1) / 2, shift);
    bool converged = found < 2;
    for (int sweep = 0; sweep < kSweeps && !converged; ++sweep) {
      const unsigned rotated = __ballot_sync(~0u, pairs.all());
      if (thread_ % 32 == 0) partial[warp_] = rotated != 0 ? 1 : 0;
      __syncthreads();
      double sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
      converged = sum == 0;
      __syncthreads();
    }
    for (int column = warp_; column < kVectors; column += kWarps) {
      const double* x = columns + column * kVectors;
      const double norm = warp_sum(kVectors, [&](int i) { return x[i] * x[i]; });
      if (thread_ % 32 == 0) norms[column] = norm;
    }
    for (int place = thread_; place < kVectors * kRow; place += kThreads) s[place] = 0;
    __syncthreads();
    if (thread_ < kVectors) {
      const double norm = norms[thread_];
      int before = 0;
#pragma unroll 1
      for (int other = 0; other < kVectors; ++other) {
        before += norms[other] > norm || (norms[other] == norm && other < thread_) ? 1 : 0;
      }
      theta[before] = fmax(norm - shift, 0.0);
      residual[thread_] = before;
    }
    __syncthreads();
    for (int place = thread_; place < kVectors * kVectors; place += kThreads) {
      const int column = place / kVectors, i = place % kVectors;
      if (!(norms[column] > 0)) continue;
      s[i * kRow + static_cast<int>(residual[column])] =
          columns[column * kVectors + i] / sqrt(norms[column]);
    }
    __syncthreads();
    take();
    return converged;
  }

  // residual[c] = the squared norm of C x - Th x, from x, y = C x and their products with G_B.
  __device__ void residuals(const double* x, const double* y, const double* z,
                            const double* w) const {
    const int column = thread_ % kVectors;
    double sum = 0;
    for (int i = thread_ / kVectors; i < rank_; i += kThreads / kVectors) {
      const int at = i * kLine + column;
      sum = fma(fma(-theta[column], x[at], y[at]), fma(-theta[column], z[at], w[at]), sum);
    }
    partial[thread_] = sum;
    __syncthreads();
    if (thread_ < kVectors) {
      double square = 0;
      for (int part = thread_; part < kThreads; part += kVectors) square += partial[part];
      residual[thread_] = square;
    }
    __syncthreads();
  }

  double* const s;
  double* const t;
  double* const partial;
  double* const theta;
  double* const residual;
  double* const diagonal;
  double* const norms;
  double* const row;   // [R] the diagonal of D
  double* const held;  // the operand at hand, or the four blocks of vectors

 private:
  __device__ static double factor_of(const double* factor, int i) {
    return factor == nullptr ? 1 : factor[i];
  }

  __device__ void take() const {
    for (int place = thread_; place < kVectors * kRow; place += kThreads) t[place] = s[place];
    __syncthreads();
  }

  __device__ void load(const double* gram, int top, int start, double (&a)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = top + group_ + i % 2 * 8;
      const int k = start + 4 * member_ + i / 2;
      a[i] = row < rank_ && k < rank_ ? gram[static_cast<int64_t>(row) * rank_ + k] : 0;
    }
  }

  const int rank_;
  const int thread_;
  const int warp_;
  const int group_;
  const int member_;
};

// What the Ritz values say, the same in every thread.
struct Verdict {
  int count;      // of pairs proved to be the leading ones and wanted; 0: none yet
  bool hopeless;  // no certificate can come in the iterations that are left
};

struct Wanted {
  double energy;  // sum of eigenvalues after which no more are needed
  double total;
  double rounding;  // of the total
  int cap;
};

__device__ Verdict judge(int vectors, const double* theta, const double* residual,
                         const Wanted& wanted, double& before, int left) {
  double all = 0;
#pragma unroll 1
  for (int i = 0; i < vectors; ++i) all += theta[i];
  const double rest = fmax(wanted.total - all, 0.0) + wanted.rounding;
  const double bound = kConverged * kConverged * theta[0];
  double sum = 0, threshold = 0;
  int needed = 0;
  bool converged = true;
#pragma unroll 1
  for (int i = 0; i < vectors; ++i) {
    converged = converged && residual[i] <= bound * theta[i];
    sum += theta[i];
    const double missed = (i + 1 < vectors ? theta[i + 1] : 0) + rest;
    const bool enough =
        sum >= wanted.energy || i + 1 == wanted.cap || missed <= 2 * wanted.rounding;
    if (needed == 0 && enough) needed = i + 1, threshold = theta[i];
    if (converged && needed > 0 && missed <= threshold) return {needed, false};
  }
  // Ritz values grow by less from one iteration to the next.
  const double growth = all - before;
  const double hoped = wanted.total - all - left * growth;
  before = all;
  return {0, hoped > (needed > 0 ? threshold : wanted.total - wanted.energy)};
}

__device__ void write_nothing(const Task& task, int64_t module, double total) {
  const int64_t square = static_cast<int64_t>(task.rank) * task.rank;
  for (int64_t i = threadIdx.x; i < square; i += kThreads) {
    task.out.left[module * square + i] = 0;
    task.out.right[module * square + i] = 0;
  }
  for (int i = static_cast<int>(threadIdx.x); i < task.rank; i += kThreads) {
    task.out.sigma[module * task.rank + i] = 0;
  }
  if (threadIdx.x == 0) {
    task.out.total_energy[module] = total;
    task.out.info[module] = 0;
    task.solved[module] = 1;
  }
}

template <int kVectors, Held kHeld>
__global__ void __launch_bounds__(kThreads, 1) iterate(Task task) {
  const int64_t module = blockIdx.x;
  if (task.again && task.solved[module] != 0) return;
  const int rank = task.rank;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t square = static_cast<int64_t>(rank) * rank;
  const int64_t step = static_cast<int64_t>(rank) + 1;
  const double* gram_b = task.gram_b + module * square;
  const double* gram_a = task.gram_a + module * square;
  const double* scale = task.scale + module * rank;
  const Block<kVectors, kHeld> block(rank, shared_memory<double>());
  constexpr int kLine = Block<kVectors, kHeld>::kLine;
  double* x = task.out.left + module * square;  // X, C X, G_B X and G_B C X
  double* y = task.memory.image + module * square;
  double* z = task.memory.dual + module * square;
  double* w = task.out.right + module * square;
  if constexpr (kHeld == Held::kAll) {
    x = block.held;
    y = x + rank * kLine;
    z = y + rank * kLine;
    w = z + rank * kLine;
  }

  double sum = 0;
  for (int64_t place = thread; place < square; place += kThreads) {
    const int64_t i = place / rank, k = place % rank;
    if (k < i) continue;
    const double product = scale[i] * gram_a[place] * scale[k];
    sum = fma(k > i ? 2 * product : product, gram_b[place], sum);
  }
  block.partial[thread] = sum;
  if (thread == 0 && !task.again) task.solved[module] = 0;
  for (int i = thread; i < rank; i += kThreads) block.row[i] = scale[i];
  __syncthreads();
  const double total = warp_sum(kThreads, [&](int i) { return block.partial[i]; });
  const double terms = terms_of(rank, gram_b, gram_a, scale);
  __syncthreads();
  const double share = fmax(rank * kEps, task.noise);
  if (terms == 0 && total == 0) return write_nothing(task, module, 0);
  // Where clients cancel, or something is not finite, the full route knows what to say.
  if (!isfinite(terms) || !isfinite(total) || !(total > kShift * share * terms)) return;
  const int even = ilogb(fmax(total, terms)) / 2 * 2;
  const int exponent = even < kLeastExponent ? kLeastExponent : even;
  const double unit = ldexp(1.0, -exponent);
  const double shift = kShift * share * fmax(total, terms) * unit;
  const Wanted wanted = {(task.energy - 4 * rank * kEps) * total * unit, total * unit,
                         share * terms * unit, task.cap};

  // Balanced between the clients as the factors' columns are when equilibrated.
  for (int i = thread; i < rank; i += kThreads) {
    const double norm_b = sqrt(fmax(gram_b[i * step], 0.0));
    const double norm_a = sqrt(fmax(gram_a[i * step], 0.0)) * fabs(scale[i]);
    const double size = norm_b > 0 && norm_a > 0 ? sqrt(norm_a / norm_b) : 0;
    for (int k = 0; k < kVectors; ++k) z[i * kLine + k] = size * start_of(i * kVectors + k);
  }
  __syncthreads();
  block.multiply(gram_a, block.row, unit, z, y);
  block.multiply(gram_b, nullptr, 1, y, w);

  const double dependent = fmax(kDependent * rank * kEps, task.noise);
  double before = 0;
  int count = 0;
  for (int iteration = 0; iteration < kIterations && count == 0; ++iteration) {
    double least = 1;
    block.inner(y, w);
    int size = block.orthonormalize(dependent, least);
    if (size == 0) return;
    block.transform(y, x);
    block.transform(w, z);
    // The first vectors are random and only a start; Ritz vectors' images seldom need more.
    const bool once = least >= kOnce;
    if (!once && iteration > 0) {
      block.inner(x, z);
      size = block.orthonormalize(dependent, least);
      block.transform(x, x);
      block.transform(z, z);
    }
    block.multiply(gram_a, block.row, unit, z, y);
    block.inner(z, y);
    if (!block.diagonalize(size, shift)) return;
    block.transform(y, y);
    block.transform(z, z);
    const bool orthonormal = once || iteration > 0;
    if (orthonormal) block.transform(x, x);
    block.multiply(gram_b, nullptr, 1, y, w);
    if (orthonormal) block.residuals(x, y, z, w);
    const Verdict verdict =
        judge(kVectors, block.theta, block.residual, wanted, before, kIterations - 1 - iteration);
    if (verdict.hopeless) return;
    count = orthonormal ? verdict.count : 0;
    __syncthreads();
  }
  if (count == 0) return;

  const double floor = rank * kEps * fmax(block.theta[0], terms * unit);
  while (count > 0 && !(block.theta[count - 1] > floor)) --count;
  const double root = ldexp(1.0, exponent / 2);
  double* left = task.out.left + module * square;
  double* right = task.out.right + module * square;
  for (int64_t place = thread; place < square; place += kThreads) {
    const int i = static_cast<int>(place / rank), k = static_cast<int>(place % rank);
    left[place] = k < count ? y[i * kLine + k] * (root / sqrt(block.theta[k])) : 0;
    const double row = i < count ? z[k * kLine + i] / sqrt(block.theta[i]) : 0;
    right[place] = row * scale[k] / root;
  }
  for (int i = thread; i < rank; i += kThreads) {
    task.out.sigma[module * rank + i] = i < count ? sqrt(block.theta[i]) * root : 0;
  }
  if (thread == 0) {
    task.out.total_energy[module] = total;
    task.out.info[module] = 0;
    task.solved[module] = 1;
  }
}

template <int kVectors>
void launch_iterate(int64_t modules, const Task& task, Stream stream) {
  const auto blocks = static_cast<unsigned>(modules);
  const auto launched = [&](auto kernel, Held held) {
    const size_t bytes = shared_bytes<kVectors>(task.rank, held);
    if (bytes > device().shared_per_block) return false;
    launch(kernel, dim3(blocks), kThreads, bytes, stream, task);
    return true;
  };
  if constexpr (kVectors == kFew) {  // 64 vectors of R >= 256 never fit
    if (launched(iterate<kVectors, Held::kAll>, Held::kAll)) return;
  }
  if (launched(iterate<kVectors, Held::kOperand>, Held::kOperand)) return;
  launched(iterate<kVectors, Held::kNone>, Held::kNone);
}

template <int kVectors>
bool fits(int64_t rank) {
  return shared_bytes<kVectors>(rank, Held::kNone) <= device().shared_per_block;
}

int64_t cap_of(int64_t rank, const SpectrumOptions& options) {
  return options.cap > 0 ? std::min(options.cap, rank) : rank;
}

}  // namespace

bool leading_pays(int64_t rank, const SpectrumOptions& options) {
  const bool part = options.energy < kPart || 2 * cap_of(rank, options) <= kMany;
  return rank > 2 * kFew && part && fits<kFew>(rank);
}

void leading(int64_t modules, int64_t rank, const double* gram_b, const double* gram_a,
             const double* scale, const SpectrumOptions& options, const Spectra& out, int* solved,
             const LeadingMemory& memory, Stream stream) {
  const auto cap = static_cast<int>(cap_of(rank, options));
  Task task = {static_cast<int>(rank), gram_b, gram_a, scale,  options.energy, cap,
               options.noise,          false,  out,    solved, memory};
  launch_iterate<kFew>(modules, task, stream);
  task.again = true;
  if (rank >= 4 * kMany && 2 * cap > kFew && fits<kMany>(rank)) {
    launch_iterate<kMany>(modules, task, stream);
  }
}

}  // namespace fedlora::cuda
