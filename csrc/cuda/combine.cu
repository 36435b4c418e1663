// combine: out_dc = sum_i x_id c_ic, a batch of skinny products on float64 tensor cores.
//
// Layout     A block makes 128 depths x kColumns columns of one module's result at a time, for as
//            many tiles of 128 as leave every SM four rounds of blocks; its 4 warps take 32 depths
//            each. Factors come through shared memory as they are and are widened in registers, in
//            3 stages of asynchronous copies. Coefficients come as float64: where two blocks can
//            keep those of all R lines, they are read with the first tile and stay; else they come
//            again with every tile. Columns are loaded and multiplied 8 at a time, and those beyond
//            a module's rank are not.
// Precision  float64 products and sums, rounded once to the factors' type, also for float32
//            coefficients: on sm_80 and sm_90 float64 tensor cores are as fast as float32
//            arithmetic.
// Memory     Shared: 3 stages x 8 KB of factors (8, 16 or 32 lines), and rows of kColumns + 4
//            coefficients for R lines or for 3 stages: for R = 128 and 64 columns 94 KB, 2 blocks
//            to an SM of 227 KB; at most 77 KB where they come again. The 4 float64 of padding keep
//            the 4 rows that a quarter warp reads in different banks. Registers: up to 64 float64
//            sums.
#include "combine.h"
#include "factors.cuh"

namespace fedlora::cuda {
namespace {

constexpr int kDepths = 128;
constexpr int kThreads = 128;
constexpr int kStages = 3;
constexpr int kBlocks = 2;  // per SM at least: 255 registers, no kernel spills
constexpr int kRounds = 4;  // of blocks on every SM: the last one, half empty, costs an eighth
constexpr int kTileBytes = kDepths * 64;

template <class S>
constexpr int kLines = 4 * kUnit<S>;  // in a stage: 8, 16 or 32
template <int kColumns>
constexpr int kPitch = kColumns + 4;

// How the tiles of a side are dealt out.
struct Plan {
  int64_t blocks;  // along the depth
  int64_t tiles;   // of one block
  bool kept;       // whether coefficients stay in shared memory
  size_t shared;
};

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class S, int kColumns>
Plan plan_of(const Factors& x, int64_t width) {
  constexpr size_t kChunk = kLines<S> * kPitch<kColumns> * sizeof(double);
  const auto shared = [](int64_t chunks) {
    return kStages * kTileBytes + static_cast<size_t>(chunks) * kChunk;
  };
  const int64_t tiles = divided(x.depth, kDepths);
  const int64_t all = x.modules * divided(width, kColumns) * tiles;
  const int64_t each = all / (kRounds * kBlocks * device().sm_count);
  // An SM has 1 KB more than a block may ask for, and sets 1 KB aside for each.
  const size_t whole = shared(divided(x.rank, kLines<S>));
  const bool kept = each > 1 && kBlocks * whole + 1024 <= device().shared_per_block;
  if (!kept) return {tiles, 1, false, shared(kStages)};
  const int64_t blocks = divided(tiles, each);
  return {blocks, divided(tiles, blocks), true, whole};
}

// Where line i of a stage stands among the coefficients: in the order of slices and lanes, 4 s + t.
template <class S, bool kAlong>
__device__ __forceinline__ int row_of(int line) {
  constexpr int kE = kUnit<S>;
  return kAlong ? line / (4 * kE) * (4 * kE) + line % kE * 4 + line % (4 * kE) / kE : line;
}

// Lines [start, start + kLines) of the factors, 128 depths from `depth` on.
template <class S, bool kRows>
__device__ __forceinline__ void load_factors(const Factors& x, Lines<S, kRows>& find, int64_t start,
                                             int64_t depth, char* tile) {
  constexpr int kE = kUnit<S>;
  constexpr int kAlong = 4;              // units of a depth on the B side
  constexpr int kAcross = kDepths / kE;  // units of a line on the A side
#pragma unroll 1
  for (int i = 0; i < kTileBytes / 16 / kThreads; ++i) {
    const int number = static_cast<int>(threadIdx.x) + i * kThreads;
    const int unit = kRows ? number % kAcross : number % kAlong;
    const int64_t line = start + (kRows ? number / kAcross : unit * kE);
    const int64_t at = depth + (kRows ? unit * kE : number / kAlong);
    char* to = tile + (kRows ? place_across<S, kDepths>(number / kAcross, unit)
                             : place_along<1>(number / kAlong, unit));
    const Line first = find(line);
    const bool whole = kRows ? at + kE <= x.depth : at < x.depth && find.together(line, kE);
    if (first.first != nullptr && whole && aligned(first.at<S>(at))) {
      copy_async<16>(to, first.at<S>(at));
    } else {
      S* numbers = reinterpret_cast<S*>(to);
      Lines<S, kRows> further = find;
#pragma unroll 1
      for (int e = 0; e < kE; ++e) {
        const Line source = kRows ? first : further(line + e);
        const int64_t position = at + (kRows ? e : 0);
        const bool inside = source.first != nullptr && position < x.depth;
        numbers[e] = inside ? *source.at<S>(position) : narrow<S>(0.0F);
      }
    }
  }
}

// The first `columns` columns of those lines, in whole eights, zero beyond them and beyond R.
template <class S, bool kRows, int kColumns>
__device__ __forceinline__ void load_coefficients(const Coefficients& from, const double* given,
                                                  int64_t start, int64_t rank, int64_t column,
                                                  int columns, double* to) {
  constexpr int kHere = kLines<S>;
  const int bits = columns <= 8 ? 3 : columns <= 16 ? 4 : columns <= 32 ? 5 : 6;
#pragma unroll 1
  for (int number = static_cast<int>(threadIdx.x); number < kHere << bits; number += kThreads) {
    // Neighbours in memory go to neighbouring threads.
    const int line = kRows ? number % kHere : number >> bits;
    const int c = kRows ? number / kHere : number & ((1 << bits) - 1);
    double* place = to + row_of<S, !kRows>(line) * kPitch<kColumns> + c;
    if (start + line < rank && c < columns) {
      copy_async<8>(place,
                    given + (start + line) * from.line_stride + (column + c) * from.column_stride);
    } else {
      *place = 0;
    }
  }
}

// Writes the first `inside` of kCount numbers, at once where they are whole and aligned.
template <class S, int kCount>
__device__ __forceinline__ void store_run(const S (&run)[kCount], S* to, int64_t inside) {
  if (inside >= kCount && reinterpret_cast<uintptr_t>(to) % sizeof(Numbers<S, kCount>) == 0) {
    Numbers<S, kCount> numbers;
#pragma unroll
    for (int i = 0; i < kCount; ++i) numbers.at[i] = run[i];
    *reinterpret_cast<Numbers<S, kCount>*>(to) = numbers;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < inside) to[i] = run[i];
    }
  }
}

// A warp's sums of 32 depths from `depth` on into the result, rounded.
template <class S, bool kRows, int kColumns>
__device__ __forceinline__ void store(const double (&sum)[2][kColumns / 8][4], int64_t depth,
                                      int64_t column, int64_t depths, int64_t width, S* out) {
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const int64_t c = column + 8 * j + 2 * t;
    if constexpr (kRows) {
      // The A side: a lane's lines lie together, four of them, or two and two in float64.
      constexpr int kRun = kUnit<S> == 2 ? 2 : 4;
#pragma unroll
      for (int part = 0; part < 8 / kRun; ++part) {
        const int block = part * kRun % 4;
        const int e = part * kRun / 4;
        const int64_t at = depth + line_of<S, false>(block, g);
        S run[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          run[i] = narrow<S>(sum[(block + i) / 2][j][(block + i) % 2 * 2 + e]);
        }
        if (c + e < width) store_run(run, out + (c + e) * depths + at, depths - at);
      }
    } else {
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        const int64_t at = depth + 8 * block + g;
        const S run[2] = {narrow<S>(sum[block / 2][j][block % 2 * 2]),
                          narrow<S>(sum[block / 2][j][block % 2 * 2 + 1])};
        if (at < depths) store_run(run, out + at * width + c, width - c);
      }
    }
  }
}

template <class S, bool kRows, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks)
    combine_tiles(Factors x, Coefficients coefficients, Plan plan, int64_t width, S* out) {
  constexpr int kE = kUnit<S>;
  constexpr int kSlices = kE < 4 ? kE : 4;
  const int64_t column_tiles = (width + kColumns - 1) / kColumns;
  const int64_t column = blockIdx.x % column_tiles * kColumns;
  const int64_t begin = blockIdx.x / column_tiles % plan.blocks * plan.tiles * kDepths;
  const int64_t module = blockIdx.x / column_tiles / plan.blocks;
  const int64_t behind = (x.depth - begin + kDepths - 1) / kDepths;
  const int tiles = static_cast<int>(behind < plan.tiles ? behind : plan.tiles);

  int64_t used = coefficients.columns < width ? coefficients.columns : width;
  if (coefficients.ranks != nullptr && coefficients.ranks[module] < used) {
    used = coefficients.ranks[module];
  }
  const int columns = used - column < kColumns ? static_cast<int>(used - column) : kColumns;
  const int chunks = columns <= 0 ? 0 : static_cast<int>((x.rank + kLines<S> - 1) / kLines<S>);
  const double* from = coefficients.data + module * coefficients.module_stride;
  // Where the coefficients of a chunk stand that is the `stage`th in the pipeline.
  const auto rows_of = [&](int chunk, int stage) {
    constexpr int kBytes = kLines<S> * kPitch<kColumns> * static_cast<int>(sizeof(double));
    return reinterpret_cast<double*>(shared_memory<char>() + kStages * kTileBytes +
                                     (plan.kept ? chunk : stage) * kBytes);
  };

  Lines<S, kRows> find(x, module);
  struct {
    int tile;
    int chunk;
    int stage;
  } next = {};
  const auto load = [&] {
    if (next.chunk < chunks && next.tile < tiles) {
      const int64_t start = static_cast<int64_t>(next.chunk) * kLines<S>;
      if (next.chunk == 0) find.seek(0);
      load_factors<S, kRows>(x, find, start, begin + next.tile * kDepths,
                             shared_memory<char>() + next.stage * kTileBytes);
      if (!plan.kept || next.tile == 0) {
        load_coefficients<S, kRows, kColumns>(coefficients, from, start, x.rank, column, columns,
                                              rows_of(next.chunk, next.stage));
      }
      if (++next.chunk == chunks) next.chunk = 0, ++next.tile;
    }
    next.stage = next.stage + 1 == kStages ? 0 : next.stage + 1;
    copy_commit();
  };

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) load();
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    double sum[2][kColumns / 8][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_wait<kStages - 2>();
      __syncthreads();
      load();
      const int stage = next.stage;  // the oldest, which the next load fills again
      const char* factors = shared_memory<char>() + stage * kTileBytes;
      S whole[4][kE];
      if constexpr (!kRows) read_fragments<S, true, kDepths, 1>(factors, warp, 0, whole);
      const double* here = rows_of(chunk, stage);
#pragma unroll
      for (int first = 0; first < kE; first += kSlices) {
        S raw[4][kSlices];
        if constexpr (kRows) {
          read_slices<S, kDepths>(factors, warp, first, raw);
        } else {
#pragma unroll
          for (int i = 0; i < 4 * kSlices; ++i) {
            raw[i / kSlices][i % kSlices] = whole[i / kSlices][first + i % kSlices];
          }
        }
        double a[2][2 * kSlices];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int s = 0; s < kSlices; ++s) {
            a[i][2 * s] = widen<double>(raw[2 * i][s]);
            a[i][2 * s + 1] = widen<double>(raw[2 * i + 1][s]);
          }
        }
        const double* row = here + (4 * first + t) * kPitch<kColumns> + g;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          if (8 * j >= columns) break;
          double b[kSlices];
#pragma unroll
          for (int s = 0; s < kSlices; ++s) b[s] = row[4 * s * kPitch<kColumns> + 8 * j];
#pragma unroll
          for (int i = 0; i < 2; ++i) mma<4 * kSlices>(sum[i][j], a[i], b);
        }
      }
    }
    store<S, kRows, kColumns>(sum, begin + tile * kDepths + warp * 32, column, x.depth, width,
                              out + module * x.depth * width);
  }
}

template <class S, bool kRows, int kColumns>
void run(const Factors& x, const Coefficients& coefficients, int64_t width, void* out,
         Stream stream) {
  const Plan plan = plan_of<S, kColumns>(x, width);
  const int64_t blocks = x.modules * plan.blocks * divided(width, kColumns);
  launch(combine_tiles<S, kRows, kColumns>, dim3(static_cast<unsigned>(blocks)), kThreads,
         plan.shared, stream, x, coefficients, plan, width, static_cast<S*>(out));
}

template <class S>
void run(const Factors& x, const Coefficients& coefficients, int64_t width, void* out,
         Stream stream) {
  const bool narrow = width <= 32;
  if (x.rows && narrow) return run<S, true, 32>(x, coefficients, width, out, stream);
  if (x.rows) return run<S, true, 64>(x, coefficients, width, out, stream);
  if (narrow) return run<S, false, 32>(x, coefficients, width, out, stream);
  run<S, false, 64>(x, coefficients, width, out, stream);
}

}  // namespace

void combine(const Factors& x, const Coefficients& coefficients, int64_t width, void* out,
             Stream stream) {
  if (x.modules * x.depth * width == 0) return;
  switch (x.dtype) {
    case DType::bf16:
      return run<bf16>(x, coefficients, width, out, stream);
    case DType::fp16:
      return run<fp16>(x, coefficients, width, out, stream);
    case DType::fp32:
      return run<float>(x, coefficients, width, out, stream);
    case DType::fp64:
      return run<double>(x, coefficients, width, out, stream);
  }
}

}  // namespace fedlora::cuda
