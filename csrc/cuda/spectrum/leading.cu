// Formula: leading.h. One block, or one cluster of blocks, does everything for a module, so a
// module ends when it is done and no decision comes back to the host.
//
// Layout     blocks of vectors row-major [R, kVectors]. All four lie in shared memory, their rows
//            shared out to the blocks of a cluster; where that does not fit, one block has them in
//            device memory (they stay in L2). A warp computes 16 rows of a product with all
//            vectors, and reads a Gram matrix straight from device memory, once; the other operand
//            comes to the block part by part, from its neighbors' shared memory or from device
//            memory. The small dense steps are done by every block alike, on the same bits.
// Precision  float64 on tensor cores; C divided by a power of four near its trace.
// Shared     two matrices [kVectors, kVectors + 1], partial sums and D; then four blocks of as many
//            rows as a block has, kVectors + 1 numbers each (different banks). 32 vectors of 227
//            KB: R <= 192 in one block, 256, 512 and 1024 in 2, 4 and 8; 64 vectors: 512 in 8. Of
//            163 KB, without clusters: 128. In device memory: one part of an operand, 17 KB.
// Work       an iteration takes 4 R^2 kVectors flops in two products and some 12 R kVectors^2
//            beside them, and reads 16 R^2 bytes. Counted for p = 6 (tests/test_cost_spectrum.cpp).
#include <algorithm>
#include <limits>

#include "coefficients.h"
#include "cuda/cholesky.cuh"
#include "cuda/eigensolver/eigensolver.h"
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
constexpr int kRows = 16;              // of a tensor-core product
constexpr int kPass = kRows * kWarps;  // rows that a block computes at a time
constexpr int kIterations = 8;
constexpr int kSweeps = 30;
constexpr double kPart = 1 - 1e-9;   // of the energy: residuals cannot tell the rest apart
constexpr double kConverged = 1e-8;  // residual over (Th_1 Th_i)^1/2: results err by its square
constexpr double kDependent = 64;    // times R eps: the share of a vector under which it is none
constexpr double kOnce = 0.1;        // pivots after which one orthonormalization is enough

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

constexpr int row_of(int vectors) { return vectors + 1; }
constexpr int part_of(int vectors) { return 2048 / vectors; }  // rows of an operand's part

// Rows of a block in a cluster of so many.
int height_of(int64_t rank, int blocks) {
  const int64_t share = (rank + blocks - 1) / blocks;
  return static_cast<int>((share + kRows - 1) / kRows * kRows);
}

size_t shared_bytes(int64_t rank, const Attempt& attempt) {
  const auto vectors = static_cast<size_t>(attempt.vectors);
  const size_t row = vectors + 1;
  const size_t rows = attempt.blocks > 0 ? 4 * static_cast<size_t>(height_of(rank, attempt.blocks))
                                         : static_cast<size_t>(part_of(attempt.vectors));
  const size_t small = 2 * vectors * row + kThreads + 4 * vectors + static_cast<size_t>(rank);
  return (small + rows * row) * sizeof(double);
}

// Uniform in (-1/2, 1/2), the same for every module.
__device__ inline double start_of(int place) {
  uint64_t bits = (static_cast<uint64_t>(place) + 1) * 0x9E3779B97F4A7C15ULL;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ULL;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBULL;
  return static_cast<double>(bits >> 11) * 0x1p-53 - 0.5;
}

// The vectors of one module, as far as this block of threads has their rows, and its threads' part
// in them.
template <int kVectors, bool kShared>
class Block {
 public:
  static constexpr int kTiles = kVectors / 8;
  static constexpr int kRow = row_of(kVectors);
  static constexpr int kLine = kShared ? kRow : kVectors;  // of a block of vectors

  __device__ Block(int rank, int height, double* shared)
      : s(shared),
        t(s + kVectors * kRow),
        partial(t + kVectors * kRow),
        theta(partial + kThreads),
        residual(theta + kVectors),
        diagonal(residual + kVectors),
        norms(diagonal + kVectors),
        row(norms + kVectors),
        held(row + rank),
        first(height * static_cast<int>(cluster_rank())),
        count(max(min(rank - first, height), 0)),
        rank_(rank),
        height_(height),
        blocks_(static_cast<int>(cluster_size())),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(thread_ / 32),
        group_(thread_ % 32 / 4),
        member_(thread_ % 4) {}

  // to [count] = the sum of the blocks' `from`, in one order, so that all of them have the same
  // bits.
  __device__ void add_up(double* from, double* to, int numbers) const {
    meet();
    for (int place = thread_; place < numbers; place += kThreads) {
      double sum = 0;
      for (int block = 0; block < blocks_; ++block) sum += cluster_shared(from, block)[place];
      to[place] = sum;
    }
    meet();
  }

  // out[i, c] = unit factor_i sum_k gram[i, k] factor_k in[k, c]; factor may be null for 1.
  __device__ void multiply(const double* gram, const double* factor, double unit, double* in,
                           double* out) const {
    const bool here = kShared && blocks_ == 1;
    const int part = kShared ? height_ : part_of(kVectors);
    double* const stage = kShared ? out : held;  // whose numbers nobody needs any more
    meet();
    for (int pass = 0; pass < count; pass += kPass) {
      const int top = pass + kRows * warp_;
      double sums[kTiles][4] = {};
      for (int start = 0; start < rank_; start += part) {
        const int depth = min(part, rank_ - start);
        if (!here) {
          const double* from = kShared ? cluster_shared(in, start / height_)
                                       : in + static_cast<int64_t>(start) * kLine;
          for (int place = thread_; place < depth * kVectors; place += kThreads) {
            const int k = place / kVectors, column = place % kVectors;
            stage[k * kRow + column] = from[k * kLine + column];
          }
          __syncthreads();
        }
        if (top < count) add_products(gram, factor, top, start, depth, here ? in : stage, sums);
        if (!here) __syncthreads();
      }
      write(unit, factor, top, sums, out);
    }
    meet();
  }

  // s = left^T right, which is symmetric: tiles below the diagonal are mirrored.
  __device__ void inner(const double* left, const double* right) const {
    constexpr int kAcross = kVectors / 8;
    for (int place = warp_; place < kVectors / kRows * kAcross; place += kWarps) {
      const int top = place / kAcross * kRows;
      const int beside = place % kAcross * 8;
      if (beside < top) continue;
      double sums[4] = {};
      for (int start = 0; start < count; start += kRows) {
        double a[8], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = start + 4 * member_ + i;
          const bool inside = k < count;
          a[2 * i] = inside ? left[k * kLine + top + group_] : 0;
          a[2 * i + 1] = inside ? left[k * kLine + top + group_ + 8] : 0;
          b[i] = inside ? right[k * kLine + beside + group_] : 0;
        }
        mma<kRows>(sums, a, b);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        double* to = t + (top + group_ + 8 * half) * kRow + beside + 2 * member_;
        to[0] = sums[2 * half];
        to[1] = sums[2 * half + 1];
        if (beside < top + kRows) continue;
        double* mirrored = t + (beside + 2 * member_) * kRow + top + group_ + 8 * half;
        mirrored[0] = sums[2 * half];
        mirrored[kRow] = sums[2 * half + 1];
      }
    }
    add_up(t, s, kVectors * kRow);
  }

  // out = in t; in place too, as a warp reads its 16 rows before it writes them.
  __device__ void transform(const double* in, double* out) const {
    for (int top = kRows * warp_; top < count; top += kPass) {
      double a[kVectors / kRows][8];
#pragma unroll
      for (int step = 0; step < kVectors / kRows; ++step) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = top + group_ + i % 2 * 8;
          const int k = kRows * step + 4 * member_ + i / 2;
          a[step][i] = row < count ? in[row * kLine + k] : 0;
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
          if (row >= count) continue;
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
        size, size, columns, kVectors, diagonal, partial, 0,
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
    for (int i = thread_ / kVectors; i < count; i += kThreads / kVectors) {
      const int at = i * kLine + column;
      sum = fma(fma(-theta[column], x[at], y[at]), fma(-theta[column], z[at], w[at]), sum);
    }
    partial[thread_] = sum;
    __syncthreads();
    if (thread_ < kVectors) {
      double square = 0;
      for (int other = thread_; other < kThreads; other += kVectors) square += partial[other];
      norms[thread_] = square;
    }
    add_up(norms, residual, kVectors);
  }

  double* const s;
  double* const t;
  double* const partial;
  double* const theta;
  double* const residual;
  double* const diagonal;
  double* const norms;
  double* const row;   // [R] the diagonal of D
  double* const held;  // the four blocks of vectors, or the part of an operand at hand
  const int first;     // of this block's rows
  const int count;     // of them

 private:
  // All threads of the cluster.
  __device__ void meet() const {
    if (blocks_ == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }

  __device__ void take() const {
    for (int place = thread_; place < kVectors * kRow; place += kThreads) t[place] = s[place];
    __syncthreads();
  }

  // sums += gram[i, k] factor_k operand[k - start, c] for `depth` terms, and 16 rows from `top` on.
  __device__ void add_products(const double* gram, const double* factor, int top, int start,
                               int depth, const double* operand, double (&sums)[kTiles][4]) const {
    constexpr bool kAhead = kVectors == kFew;  // registers for the numbers of the next step, too
    double next[8];
    if constexpr (kAhead) load(gram, factor, top, start, next);
    for (int done = 0; done < depth; done += kRows) {
      double a[8];
      if constexpr (kAhead) {
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] = next[i];
        if (done + kRows < depth) load(gram, factor, top, start + done + kRows, next);
      } else {
        load(gram, factor, top, start + done, a);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        double b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = done + 4 * member_ + i;
          b[i] = k < depth ? operand[k * kRow + 8 * tile + group_] : 0;
        }
        mma<kRows>(sums[tile], a, b);
      }
    }
  }

  __device__ void load(const double* gram, const double* factor, int top, int start,
                       double (&a)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int own = top + group_ + i % 2 * 8;
      const int k = start + 4 * member_ + i / 2;
      const bool inside = own < count && k < rank_;
      a[i] = inside ? gram[static_cast<int64_t>(first + own) * rank_ + k] : 0;
      if (factor != nullptr && inside) a[i] *= factor[k];
    }
  }

  __device__ void write(double unit, const double* factor, int top, const double (&sums)[kTiles][4],
                        double* out) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = top + group_ + 8 * half;
      if (own >= count) continue;
      const double each = factor == nullptr ? unit : unit * factor[first + own];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        double* to = out + own * kLine + 8 * tile + 2 * member_;
        to[0] = sums[tile][2 * half] * each;
        to[1] = sums[tile][2 * half + 1] * each;
      }
    }
  }

  const int rank_;
  const int height_;  // rows of every block but the last
  const int blocks_;  // of the cluster
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

template <int kVectors, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) iterate(Task task, int height) {
  const int64_t module = blockIdx.x / cluster_size();
  if (task.again && task.solved[module] != 0) return;
  const int rank = task.rank;
  const int thread = static_cast<int>(threadIdx.x);
  const bool speaks = thread == 0 && cluster_rank() == 0;
  const int64_t square = static_cast<int64_t>(rank) * rank;
  const int64_t step = static_cast<int64_t>(rank) + 1;
  const double* gram_b = task.gram_b + module * square;
  const double* gram_a = task.gram_a + module * square;
  const double* scale = task.scale + module * rank;
  const Block<kVectors, kShared> block(rank, height, shared_memory<double>());
  constexpr int kLine = Block<kVectors, kShared>::kLine;
  double* x = task.out.left + module * square;  // X, C X, G_B X and G_B C X
  double* y = task.memory.image + module * square;
  double* z = task.memory.dual + module * square;
  double* w = task.out.right + module * square;
  if constexpr (kShared) {
    x = block.held;
    y = x + height * kLine;
    z = y + height * kLine;
    w = z + height * kLine;
  }

  double sum = 0;
  for (int place = thread; place < block.count * rank; place += kThreads) {
    const int i = block.first + place / rank, k = place % rank;
    if (k < i) continue;
    const int64_t at = static_cast<int64_t>(i) * rank + k;
    const double product = scale[i] * gram_a[at] * scale[k];
    sum = fma(k > i ? 2 * product : product, gram_b[at], sum);
  }
  block.partial[thread] = sum;
  if (speaks && !task.again) task.solved[module] = 0;
  for (int i = thread; i < rank; i += kThreads) block.row[i] = scale[i];
  block.add_up(block.partial, block.t, kThreads);
  const double total = warp_sum(kThreads, [&](int i) { return block.t[i]; });
  const double terms = terms_of(rank, gram_b, gram_a, scale);
  __syncthreads();
  const double share = fmax(rank * kEps, task.noise);
  if (terms == 0 && total == 0) {
    if (cluster_rank() == 0) write_nothing(task, module, 0);
    return;
  }
  // Where clients cancel, or something is not finite, the full route knows what to say.
  if (!isfinite(terms) || !isfinite(total) || !(total > kShift * share * terms)) return;
  const int even = ilogb(fmax(total, terms)) / 2 * 2;
  const int exponent = even < kLeastExponent ? kLeastExponent : even;
  const double unit = ldexp(1.0, -exponent);
  const double shift = kShift * share * fmax(total, terms) * unit;
  const Wanted wanted = {(task.energy - 4 * rank * kEps) * total * unit, total * unit,
                         share * terms * unit, task.cap};

  // Balanced between the clients as the factors' columns are when equilibrated.
  for (int own = thread; own < block.count; own += kThreads) {
    const int i = block.first + own;
    const double norm_b = sqrt(fmax(gram_b[i * step], 0.0));
    const double norm_a = sqrt(fmax(gram_a[i * step], 0.0)) * fabs(scale[i]);
    const double size = norm_b > 0 && norm_a > 0 ? sqrt(norm_a / norm_b) : 0;
    for (int k = 0; k < kVectors; ++k) z[own * kLine + k] = size * start_of(i * kVectors + k);
  }
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
  for (int place = thread; place < block.count * rank; place += kThreads) {
    const int own = place / rank, k = place % rank;
    const double value = k < count ? y[own * kLine + k] * (root / sqrt(block.theta[k])) : 0;
    left[static_cast<int64_t>(block.first + own) * rank + k] = value;
  }
  for (int place = thread; place < block.count * rank; place += kThreads) {
    const int i = place / block.count, own = place % block.count;
    const double value = i < count ? z[own * kLine + i] / sqrt(block.theta[i]) : 0;
    const int k = block.first + own;
    right[static_cast<int64_t>(i) * rank + k] = value * scale[k] / root;
  }
  for (int own = thread; own < block.count; own += kThreads) {
    const int i = block.first + own;
    task.out.sigma[module * rank + i] = i < count ? sqrt(block.theta[i]) * root : 0;
  }
  if (speaks) {
    task.out.total_energy[module] = total;
    task.out.info[module] = 0;
    task.solved[module] = 1;
  }
}

template <int kVectors>
void launch_iterate(int64_t modules, const Attempt& attempt, const Task& task, Stream stream) {
  const int blocks = std::max(attempt.blocks, 1);
  const int height = attempt.blocks > 0 ? height_of(task.rank, blocks) : task.rank;
  const auto launched = [&](auto kernel) {
    launch_cluster(kernel, dim3(static_cast<unsigned>(modules * blocks)), blocks, kThreads,
                   shared_bytes(task.rank, attempt), stream, task, height);
  };
  if (attempt.blocks > 0) return launched(iterate<kVectors, true>);
  launched(iterate<kVectors, false>);
}

int64_t cap_of(int64_t rank, const SpectrumOptions& options) {
  return options.cap > 0 ? std::min(options.cap, rank) : rank;
}

// Where this many vectors lie: in the shared memory of as few blocks as hold them, else in device
// memory. A block of a cluster computes its rows in one pass.
void add(int64_t rank, int vectors, std::vector<Attempt>& attempts) {
  for (const int blocks : {1, 2, 4, 8, 0}) {
    if (blocks > 1 && (device().capability < 90 || height_of(rank, blocks) > kPass)) continue;
    const Attempt attempt = {vectors, blocks};
    if (shared_bytes(rank, attempt) <= device().shared_per_block) {
      return attempts.push_back(attempt);
    }
  }
}

}  // namespace

std::vector<Attempt> leading_attempts(int64_t rank, const SpectrumOptions& options) {
  const int64_t cap = cap_of(rank, options);
  std::vector<Attempt> attempts;
  if (rank <= 2 * kFew || (options.energy >= kPart && 2 * cap > kMany)) return attempts;
  add(rank, kFew, attempts);
  if (rank >= 4 * kMany && 2 * cap > kFew) add(rank, kMany, attempts);
  return attempts;
}

void leading(int64_t modules, int64_t rank, const std::vector<Attempt>& attempts,
             const double* gram_b, const double* gram_a, const double* scale,
             const SpectrumOptions& options, const Spectra& out, int* solved,
             const LeadingMemory& memory, Stream stream) {
  const auto cap = static_cast<int>(cap_of(rank, options));
  Task task = {static_cast<int>(rank), gram_b, gram_a, scale,  options.energy, cap,
               options.noise,          false,  out,    solved, memory};
  for (const Attempt& attempt : attempts) {
    if (attempt.vectors == kFew) {
      launch_iterate<kFew>(modules, attempt, task, stream);
    } else {
      launch_iterate<kMany>(modules, attempt, task, stream);
    }
    task.again = true;
  }
}

}  // namespace fedlora::cuda
