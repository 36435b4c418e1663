// Formula: rotations.cuh; a round-robin tournament in one block, or in a cluster of blocks.
//
// Layout     a cluster's columns lie in 2C halves of w, two in each block's shared memory. A sweep
//            takes all pairs within a block, then 2C - 2 times the halves move on by one place of a
//            tournament (through distributed shared memory: n^2 numbers, where the rounds that
//            follow take 4 w n^2) and each block takes the pairs across its two.
// Precision  float64; the matrix was divided by a power of four near its trace, so squares of inner
//            products neither overflow nor vanish.
// Shared     2 w columns of ld numbers, w = ceil(R / 2C), ld = R rounded up to 8; their squared
//            norms, those of all columns of the cluster, and flags: R <= 168 of 227 KB, 142 of 163;
//            236 for two blocks, 336 for four, 472 for eight.
#include <limits>

#include "cuda/cholesky.cuh"
#include "jacobi.h"
#include "rotations.cuh"

namespace fedlora::cuda {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kSweeps = 30;  // 7 to 11 are usual up to n = 448

// How a pair of columns of up to kLanes * kChunks numbers is shared out. A thread holds 2 kChunks
// numbers beside some 45 registers for the rotation, and the most threads are what the file of
// 65536 registers then allows. Fewer lanes mean fewer shuffles, of which the warp does one a clock.
template <int kLanes_, int kChunks_, int kMostThreads_>
struct Shape {
  static constexpr int kLanes = kLanes_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kMostThreads = kMostThreads_;
};
using Shape64 = Shape<8, 8, 256>;
using Shape128 = Shape<16, 8, 640>;
using Shape160 = Shape<16, 10, 640>;
using Shape320 = Shape<32, 10, 640>;
using Shape512 = Shape<32, 16, 512>;
constexpr int kMostWarps = 20;
constexpr int64_t kMostRows = 512;

struct JacobiSize {
  int blocks;  // of the cluster
  int width;   // columns of half a block
  int ld;

  JacobiSize(int64_t rank, int cluster)
      : blocks(cluster),
        width(static_cast<int>((rank + 2 * cluster - 1) / (2 * cluster))),
        ld(static_cast<int>((rank + 7) / 8 * 8)) {}

  size_t shared() const {
    const size_t columns = 2 * static_cast<size_t>(width);
    const size_t flags = 2;
    return (columns * static_cast<size_t>(ld) + columns * static_cast<size_t>(blocks + 1) + flags +
            kMostWarps) *
           sizeof(double);
  }
};

// Moves the halves of all blocks of the cluster on by one place of a round-robin tournament: the
// first half of block 0 stays, the others go round.
__device__ inline void exchange(double* columns, int half) {
  constexpr int kEach = 4;  // numbers of each half a thread moves at a time
  const auto blocks = static_cast<int>(cluster_size());
  const auto rank = static_cast<int>(cluster_rank());
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const double* from_first = rank == 0   ? columns
                             : rank == 1 ? cluster_shared(columns, 0) + half
                                         : cluster_shared(columns, rank - 1);
  const double* from_second =
      rank == blocks - 1 ? columns : cluster_shared(columns, rank + 1) + half;
  cluster_sync();
  for (int base = 0; base < half; base += kEach * threads) {
    double first[kEach], second[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = base + i * threads + thread;
      first[i] = place < half ? from_first[place] : 0;
      second[i] = place < half ? from_second[place] : 0;
    }
    cluster_sync();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = base + i * threads + thread;
      if (place < half) {
        columns[place] = first[i];
        columns[half + place] = second[i];
      }
    }
  }
  cluster_sync();
}

// Whether any thread of the cluster says so. flags [2 + warps] in shared memory, alternating
// between calls, so that one barrier is enough between a block's reading and its neighbours' next
// writing.
template <bool kCluster>
__device__ bool any(bool here, double* flags, int call) {
  double* warps = flags + 2;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const unsigned said = __ballot_sync(~0u, here);
  if (threadIdx.x % 32 == 0) warps[warp] = said != 0 ? 1 : 0;
  __syncthreads();
  double own = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) own += warps[i];
  if constexpr (kCluster) {
    double* flag = flags + call % 2;
    if (threadIdx.x == 0) *flag = own;
    cluster_sync();
    for (unsigned block = 0; block < cluster_size(); ++block) own += *cluster_shared(flag, block);
  } else {
    __syncthreads();
  }
  return own > 0;
}

// One module a cluster: sweeps until no pair was rotated, then sigma and W in descending order.
template <class Shape, bool kCluster>
__global__ void __launch_bounds__(Shape::kMostThreads, 1)
    jacobi(Eigenproblem problem, ShiftedFactor shifted, JacobiSize size) {
  const int blocks = kCluster ? static_cast<int>(cluster_size()) : 1;
  const int own = kCluster ? static_cast<int>(cluster_rank()) : 0;
  const int module = static_cast<int>(blockIdx.x) / blocks;
  if (problem.solved != nullptr && problem.solved[module] != 0) return;
  const int rank = static_cast<int>(problem.rank);
  const int rows = shifted.columns[module] > 0 ? problem.sizes[module] : 0;
  const int n = shifted.columns[module];
  const int64_t square = problem.rank * problem.rank;
  const double* factor = problem.factor + module * square;
  const double shift = shifted.shift[module];
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  // No more columns than this module has.
  const int width = (n + 2 * blocks - 1) / (2 * blocks);
  const int held = 2 * width;

  double* columns = shared_memory<double>();
  double* norms = columns + 2 * size.width * size.ld;
  double* all_norms = norms + 2 * size.width;
  double* flags = all_norms + 2 * size.width * blocks;

  for (int place = thread; place < held * size.ld; place += threads) {
    const int column = own * held + place / size.ld;
    const int row = place % size.ld;
    const bool inside = column < n && row < rows;
    columns[place] = inside ? factor[static_cast<int64_t>(column) * rank + row] : 0;
  }
  if constexpr (kCluster) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  const ColumnPairs<Shape::kLanes, Shape::kChunks> pairs(columns, size.ld, rows, width, shift);
  bool converged = n < 2;
  for (int sweep = 0; sweep < kSweeps && !converged; ++sweep) {
    bool rotated = pairs.all();
    if constexpr (kCluster) {
      for (int round = 1; round < 2 * blocks - 1; ++round) {
        exchange(columns, width * size.ld);
        rotated |= pairs.across();
      }
    }
    converged = !any<kCluster>(rotated, flags, sweep);
  }

  const int lane = thread % 32;
  for (int column = thread / 32; column < held; column += threads / 32) {
    const double* x = columns + column * size.ld;
    const double norm = warp_sum(rows, [&](int i) { return x[i] * x[i]; });
    if (lane == 0) norms[column] = norm;
  }
  if constexpr (kCluster) {
    cluster_sync();
    for (int i = thread; i < held * blocks; i += threads) {
      all_norms[i] = cluster_shared(norms, i / held)[i % held];
    }
    cluster_sync();  // also: no block leaves while others read its memory
  } else {
    __syncthreads();
    all_norms = norms;
  }

  const int total = held * blocks;
  double largest = 0;
  for (int i = lane; i < total; i += 32) largest = fmax(largest, all_norms[i]);
  for (int step = 16; step > 0; step /= 2) {
    largest = fmax(largest, __shfl_xor_sync(~0u, largest, step));
  }
  const int exponent = shifted.exponent[module];
  const double terms = ldexp(problem.terms[module], -exponent);
  const double floor = shift + rank * kEps * fmax(largest - shift, terms);
  double* sigma = problem.sigma + module * problem.rank;
  double* vectors = problem.matrix + module * square;
  for (int column = thread / 32; column < held; column += threads / 32) {
    const double norm = norms[column];
    const int index = own * held + column;
    int before = 0;
    for (int base = 0; base < total; base += 32) {
      const int other = base + lane;
      const bool ahead =
          other < total && (all_norms[other] > norm || (all_norms[other] == norm && other < index));
      before += __popc(__ballot_sync(~0u, ahead));
    }
    if (!(norm > floor)) continue;
    const double inverse = 1 / sqrt(norm);
    for (int i = lane; i < rows; i += 32) {
      vectors[static_cast<int64_t>(before) * rank + i] = columns[column * size.ld + i] * inverse;
    }
    if (lane == 0) sigma[before] = ldexp(sqrt(norm - shift), exponent / 2);
  }
  if (own == 0) {
    int count = 0;
    for (int i = 0; i < total; ++i) count += all_norms[i] > floor ? 1 : 0;
    for (int i = count + thread; i < rank; i += threads) sigma[i] = 0;
    if (thread == 0) {
      problem.count[module] = count;
      if (!converged) problem.info[module] = 1;
    }
  }
}

template <class Shape, bool kCluster>
void launch_shape(const Eigenproblem& problem, const ShiftedFactor& factor, const JacobiSize& size,
                  Stream stream) {
  // As many rounds as the threads ask for, and no more threads than share those evenly.
  const int rounds = (size.width * Shape::kLanes + Shape::kMostThreads - 1) / Shape::kMostThreads;
  const int groups = (size.width + rounds - 1) / rounds;
  const int threads = (groups * Shape::kLanes + 31) / 32 * 32;
  const auto grid = static_cast<unsigned>(problem.modules * size.blocks);
  launch_cluster(jacobi<Shape, kCluster>, dim3(grid), size.blocks, threads, size.shared(), stream,
                 problem, factor, size);
}

}  // namespace

int jacobi_blocks(int64_t rank) {
  for (const int blocks : {1, 2, 4, 8}) {
    if (blocks > 1 && device().capability < 90) break;
    if (JacobiSize(rank, blocks).shared() <= device().shared_per_block && rank <= kMostRows) {
      return blocks;
    }
  }
  return 0;
}

void rotate_columns(const Eigenproblem& problem, const ShiftedFactor& factor, int blocks,
                    Stream stream) {
  const int64_t rank = problem.rank;
  const JacobiSize size(rank, blocks);
  if (size.blocks == 1) {
    if (rank <= 64) return launch_shape<Shape64, false>(problem, factor, size, stream);
    if (rank <= 128) return launch_shape<Shape128, false>(problem, factor, size, stream);
    if (rank <= 160) return launch_shape<Shape160, false>(problem, factor, size, stream);
    return launch_shape<Shape320, false>(problem, factor, size, stream);
  }
  if (rank <= 320) return launch_shape<Shape320, true>(problem, factor, size, stream);
  launch_shape<Shape512, true>(problem, factor, size, stream);
}

}  // namespace fedlora::cuda
