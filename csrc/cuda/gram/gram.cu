// gram: G_ij = sum_d x_id x_jd, a batched SYRK on tensor cores.
//
// Layout     A block makes one 64 x 64 tile of the upper triangle of one module's G, from one share
//            of the depth; its 4 warps take 32 x 32 each (a quadrant), those beyond R do nothing.
//            On the diagonal the lower left quadrant is not wanted: three warps make 32 x 24
//            numbers of their quadrants, and the fourth the last 8 columns of all three, so that
//            every warp, on a scheduler of its own, does 3/4 of a quadrant. Lines of x come
//            through shared memory as they are, 3 stages of asynchronous copies, and are widened
//            in registers.
// Precision  Exact: float64 tensor cores. Fast: bf16 and fp16 as they are, fp32 as the sum of two
//            tf32 (three products, the fourth is under 2^-24), float32 sums of one stage (64 terms,
//            32 for fp32) added up in float64: tensor cores cut float32 sums off instead of
//            rounding them, a bias that longer sums would carry into canceling clients, and the
//            additions (32 a thread and stage) hide behind the products. float64 data is always
//            exact.
// Order      Shares of the depth are added up in their order by a second kernel, so that results
//            repeat bit for bit; both triangles are written from the same sum.
// Memory     Shared: 3 stages x (64 + 64 lines) x 128 bytes + 2 KB of line addresses = 50 KB, so
//            that 4 blocks fit an SM of 227 KB and 3 one of 163 KB. Registers: 32 float64 sums are
//            64 of them, 16 + 4 widened operands 40; with fragments and addresses under 220, so
//            that 2 blocks fit, and 3 where fewer fragments are held (blocks_per_sm).
#include "cuda/factors.cuh"
#include "gram.h"
#include "products.cuh"

namespace fedlora::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kThreads = 128;
constexpr int kSteps = 2;                        // of 64 bytes of depth
constexpr int kTileBytes = kTile * 64 * kSteps;  // in one stage, whatever the type
constexpr int kStages = 3;
constexpr int kSums = 32;  // a thread's share of a tile
constexpr size_t kShared = 2 * kTile * sizeof(Line) + kStages * 2 * kTileBytes;

template <class S>
constexpr int kDepth = 4 * kSteps * kUnit<S>;  // depths in a stage: 16, 32 or 64

// Blocks that an SM holds: 3 where 168 registers are enough on every architecture, else 2 of 255.
constexpr int blocks_per_sm(int64_t bytes, bool fast) {
  return bytes == 8 || (bytes == 2 && fast) ? 3 : 2;
}

struct Split {
  int64_t tiles;   // of a side: ceil(R / 64)
  int64_t pairs;   // of tiles on and above the diagonal
  int64_t shares;  // of the depth
  int64_t share;   // depths in one
};

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many shares of the depth as it takes to give every SM all blocks that it holds, but none
// shorter than 8 stages: under that, filling the pipeline costs more than the idle SMs.
Split split_of(const Factors& x, bool fast) {
  Split split = {};
  split.tiles = divided(x.rank, kTile);
  split.pairs = split.tiles * (split.tiles + 1) / 2;
  const int64_t size = bytes_of(x.dtype);
  const int64_t stage = 64 * kSteps / size;
  const int64_t blocks = x.modules * split.pairs;
  const int64_t held = blocks_per_sm(size, fast) * device().sm_count;
  const int64_t wanted = blocks == 0 ? 1 : divided(held, blocks);
  const int64_t most = x.depth / (8 * stage);
  const int64_t shares = wanted < most ? wanted : most;
  split.share = divided(divided(x.depth, shares < 1 ? 1 : shares), stage) * stage;
  if (split.share == 0) split.share = stage;
  split.shares = x.depth == 0 ? 1 : divided(x.depth, split.share);
  return split;
}

// Pair number p of a triangle in the order (0,0) (0,1) (1,1) (0,2) ...
__device__ __forceinline__ void tiles_of(int64_t pair, int64_t& row, int64_t& column) {
  column = 0;
  while ((column + 1) * (column + 2) / 2 <= pair) ++column;
  row = pair - column * (column + 1) / 2;
}

// One tile of a stage: lines [64] x kDepth numbers from `start` on, zero from `end` on.
template <class S, bool kRows>
__device__ __forceinline__ void load_tile(const Line* lines, bool together, int64_t start,
                                          int64_t end, char* tile) {
  constexpr int kE = kUnit<S>;
  constexpr int kAcross = kTile / kE;  // units of one depth on the B side
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kTileBytes / 16 / kThreads; ++i) {
    const int number = thread + i * kThreads;
    const int line = kRows ? number / (4 * kSteps) : number % kAcross * kE;
    const int unit = kRows ? number % (4 * kSteps) : number % kAcross;
    const int64_t depth = start + (kRows ? unit * kE : number / kAcross);
    char* to = tile + (kRows ? place_along<kSteps>(line, unit)
                             : place_across<S, kTile>(number / kAcross, unit));
    const S* from = lines[line].at<S>(depth);
    const bool whole = kRows ? depth + kE <= end : depth < end && together;
    if (lines[line].first != nullptr && whole && aligned(from)) {
      copy_async<16>(to, from);
    } else {
      S* numbers = reinterpret_cast<S*>(to);
#pragma unroll
      for (int e = 0; e < kE; ++e) {
        const Line& source = lines[line + (kRows ? 0 : e)];
        const int64_t at = depth + (kRows ? e : 0);
        const bool inside = source.first != nullptr && at < end;
        numbers[e] = inside ? *source.at<S>(at) : narrow<S>(0.0F);
      }
    }
  }
}

// Which 8 columns a warp's sums [i][j] are: number `block` of the quadrant's four.
struct Columns {
  int row;  // of the quadrant in the tile
  int column;
  int block;
};

constexpr int kHelper = 2;  // the warp that has no quadrant of its own on the diagonal

__device__ __forceinline__ Columns columns_of(int warp, bool diagonal, int j) {
  if (diagonal && warp == kHelper) return {j == 2 ? 1 : 0, j == 0 ? 0 : 1, 3};
  return {warp / 2, warp % 2, j};
}

// A thread's sums into both triangles of G.
template <class S, bool kRows>
__device__ __forceinline__ void store(const double (&sum)[2][4][4], int64_t row_tile,
                                      int64_t column_tile, int64_t rank, double* out) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool diagonal = row_tile == column_tile;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (diagonal && j == 3) break;
      const Columns at = columns_of(warp, diagonal, j);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t row =
            row_tile * kTile + at.row * 32 + line_of<S, kRows>(2 * i + e / 2, lane / 4);
        const int64_t column = column_tile * kTile + at.column * 32 +
                               line_of<S, kRows>(at.block, lane % 4 * 2 + e % 2);
        if (row <= column && column < rank) {
          out[row * rank + column] = sum[i][j][e];
          out[column * rank + row] = sum[i][j][e];
        }
      }
    }
  }
}

template <class S, bool kRows, bool kFast>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(S), kFast))
    gram_tiles(Factors x, Split split, double* partial, double* out) {
  Line* lines = shared_memory<Line>();
  char* stages = shared_memory<char>() + 2 * kTile * sizeof(Line);
  const int64_t pair = blockIdx.x % split.pairs;
  const int64_t share = blockIdx.x / split.pairs % split.shares;
  const int64_t module = blockIdx.x / split.pairs / split.shares;
  int64_t row_tile;
  int64_t column_tile;
  tiles_of(pair, row_tile, column_tile);
  const bool diagonal = row_tile == column_tile;

  const int thread = static_cast<int>(threadIdx.x);
  {
    const int64_t line = (thread < kTile ? row_tile : column_tile) * kTile + thread % kTile;
    Lines<S, kRows> find(x, module);
    find.seek(line);
    lines[thread] = find(line);
  }
  __syncthreads();

  // On the B side a thread always copies the same units of a tile: E lines, in one piece or not.
  bool together[2] = {true, true};
  if constexpr (!kRows) {
    constexpr int kE = kUnit<S>;
    for (int side = 0; side < 2; ++side) {
      const Line* unit = lines + side * kTile + thread % (kTile / kE) * kE;
      for (int e = 1; e < kE; ++e) {
        together[side] = together[side] && unit[e].step == unit[0].step &&
                         unit[e].first == unit[0].first + e * sizeof(S);
      }
    }
  }

  const int64_t begin = share * split.share;
  const int64_t end = begin + split.share < x.depth ? begin + split.share : x.depth;
  const int count = static_cast<int>((end - begin + kDepth<S> - 1) / kDepth<S>);
  const auto load = [&](int chunk) {
    if (chunk < count) {
      char* tile = stages + chunk % kStages * 2 * kTileBytes;
      const int64_t start = begin + static_cast<int64_t>(chunk) * kDepth<S>;
      load_tile<S, kRows>(lines, together[0], start, end, tile);
      if (!diagonal) {
        load_tile<S, kRows>(lines + kTile, together[1], start, end, tile + kTileBytes);
      }
    }
    copy_commit();
  };

  const int warp_row = thread / 64;
  const int warp_column = thread / 32 % 2;
  const bool helps = diagonal && thread / 32 == kHelper;
  const bool works = helps || (row_tile * kTile + warp_row * 32 < x.rank &&
                               column_tile * kTile + warp_column * 32 < x.rank);
  double sum[2][4][4] = {};
  float part[2][4][4] = {};
  float mixed[2][4][4] = {};
  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
  for (int chunk = 0; chunk < count; ++chunk) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(chunk + kStages - 1);
    if (!works) continue;
    const char* rows = stages + chunk % kStages * 2 * kTileBytes;
    const char* columns = diagonal ? rows : rows + kTileBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      S left[4][kUnit<S>];
      S right[4][kUnit<S>];
      read_fragments<S, kRows, kTile, kSteps>(rows, helps ? 0 : warp_row, step, left);
      read_fragments<S, kRows, kTile, kSteps>(columns, helps ? 1 : warp_column, step, right);
      if (!helps) {
        multiply<0, 4, kFast>(left, right, !diagonal, sum, part, mixed);
        continue;
      }
      S last[4][kUnit<S>];
#pragma unroll
      for (int s = 0; s < kUnit<S>; ++s) {
        last[0][s] = left[3][s];
        last[1][s] = last[2][s] = last[3][s] = right[3][s];
      }
      multiply<0, 2, kFast>(left, last, true, sum, part, mixed);
      multiply<2, 3, kFast>(right, last, true, sum, part, mixed);
    }
    if constexpr (kFast) promote(part, sum);
    if constexpr (kFast && sizeof(S) == 4) promote(mixed, sum);
  }

  if (split.shares == 1) {
    store<S, kRows>(sum, row_tile, column_tile, x.rank, out + module * x.rank * x.rank);
  } else {
    double* to = partial + blockIdx.x * static_cast<int64_t>(kSums * kThreads) + thread;
#pragma unroll
    for (int i = 0; i < kSums; ++i) to[i * kThreads] = (&sum[0][0][0])[i];
  }
}

template <class S, bool kRows>
__global__ void __launch_bounds__(kThreads)
    gram_shares(Factors x, Split split, const double* partial, double* out) {
  const int64_t pair = blockIdx.x % split.pairs;
  const int64_t module = blockIdx.x / split.pairs;
  double sum[2][4][4] = {};
  for (int64_t share = 0; share < split.shares; ++share) {
    const int64_t block = (module * split.shares + share) * split.pairs + pair;
    const double* from = partial + block * (kSums * kThreads) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; ++i) (&sum[0][0][0])[i] += from[i * kThreads];
  }
  int64_t row_tile;
  int64_t column_tile;
  tiles_of(pair, row_tile, column_tile);
  store<S, kRows>(sum, row_tile, column_tile, x.rank, out + module * x.rank * x.rank);
}

template <class S, bool kRows, bool kFast>
void run(const Factors& x, double* out, void* workspace, Stream stream) {
  const Split split = split_of(x, kFast);
  const int64_t tiles = x.modules * split.pairs;
  double* partial = static_cast<double*>(workspace);
  launch(gram_tiles<S, kRows, kFast>, dim3(static_cast<unsigned>(tiles * split.shares)), kThreads,
         kShared, stream, x, split, partial, out);
  if (split.shares > 1) {
    launch(gram_shares<S, kRows>, dim3(static_cast<unsigned>(tiles)), kThreads, 0, stream, x, split,
           partial, out);
  }
}

template <class S>
void run(const Factors& x, bool fast, double* out, void* workspace, Stream stream) {
  if constexpr (sizeof(S) < 8) {
    if (fast && x.rows) return run<S, true, true>(x, out, workspace, stream);
    if (fast) return run<S, false, true>(x, out, workspace, stream);
  }
  if (x.rows) return run<S, true, false>(x, out, workspace, stream);
  run<S, false, false>(x, out, workspace, stream);
}

}  // namespace

size_t gram_workspace(const Factors& x, bool fast) {
  const Split split = split_of(x, fast);
  if (split.shares == 1) return 0;
  return static_cast<size_t>(x.modules * split.pairs * split.shares) * kSums * kThreads *
         sizeof(double);
}

void gram(const Factors& x, bool fast, double* out, void* workspace, Stream stream) {
  if (x.modules * x.rank == 0) return;
  switch (x.dtype) {
    case DType::bf16:
      return run<bf16>(x, fast, out, workspace, stream);
    case DType::fp16:
      return run<fp16>(x, fast, out, workspace, stream);
    case DType::fp32:
      return run<float>(x, fast, out, workspace, stream);
    case DType::fp64:
      return run<double>(x, fast, out, workspace, stream);
  }
}

}  // namespace fedlora::cuda
