// combine: out_dc = sum_i x_id c_ic, a batch of skinny products on float64 tensor cores.
//
// Layout     A block makes 128 depths x kColumns columns of one module's result; its 4 warps take
//            32 depths each. Factors come through shared memory as they are and are widened in
//            registers, coefficients come as float64, in 3 stages of asynchronous copies. Columns
//            are done 8 at a time, and those beyond a module's rank are not done.
// Precision  float64 products and sums, rounded once to the factors' type, also for float32
//            coefficients: on sm_80 and sm_90 float64 tensor cores are as fast as float32
//            arithmetic.
// Memory     Shared: 3 stages x (16 KB of factors, 8 KB of 16-bit ones, and 16 or 32 rows of
//            kColumns + 4 coefficients): 99 KB for fp32 and 64 columns, 2 blocks to an SM of 227
//            KB, 74 KB for 32 columns. The 4 float64 of padding keep the 4 rows that a quarter
//            warp reads in different banks. Registers: up to 64 float64 sums.
#include "combine.h"
#include "factors.cuh"

namespace fedlora::cuda {
namespace {

constexpr int kDepths = 128;
constexpr int kThreads = 128;
constexpr int kStages = 3;
constexpr int kBlocks = 2;  // per SM at least: 255 registers, no kernel spills

// 64-byte steps of the ranks in a stage. 16-bit factors take one, or 64 rows of coefficients would
// fill the shared memory.
template <class S>
constexpr int kSteps = sizeof(S) == 2 ? 1 : 2;
template <class S>
constexpr int kLines = 4 * kSteps<S> * kUnit<S>;  // in a stage: 16 or 32
template <class S>
constexpr int kTileBytes = kDepths * 64 * kSteps<S>;
template <int kColumns>
constexpr int kPitch = kColumns + 4;
template <class S, int kColumns>
constexpr int kStageBytes =
    kTileBytes<S> + kLines<S> * kPitch<kColumns> * static_cast<int>(sizeof(double));

// Where line i of a stage stands among the coefficients: in the order of slices and lanes, 4 s + t.
template <class S, bool kAlong>
__device__ __forceinline__ int row_of(int line) {
  constexpr int kE = kUnit<S>;
  return kAlong ? line / (4 * kE) * (4 * kE) + line % kE * 4 + line % (4 * kE) / kE : line;
}

// Lines [start, start + kLines) of the factors, 128 depths from `depth` on.
template <class S, bool kRows>
__device__ __forceinline__ void load_factors(const Factors& x, Lines& find, int64_t start,
                                             int64_t depth, char* tile) {
  constexpr int kE = kUnit<S>;
  constexpr int kAlong = 4 * kSteps<S>;  // units of a depth on the B side
  constexpr int kAcross = kDepths / kE;  // units of a line on the A side
#pragma unroll 1
  for (int i = 0; i < kTileBytes<S> / 16 / kThreads; ++i) {
    const int number = static_cast<int>(threadIdx.x) + i * kThreads;
    const int unit = kRows ? number % kAcross : number % kAlong;
    const int64_t line = start + (kRows ? number / kAcross : unit * kE);
    const int64_t at = depth + (kRows ? unit * kE : number / kAlong);
    char* to = tile + (kRows ? place_across<S, kDepths>(number / kAcross, unit)
                             : place_along<kSteps<S>>(number / kAlong, unit));
    const Line first = find(line);
    const bool whole = kRows ? at + kE <= x.depth : at < x.depth && find.together(line, kE);
    if (first.first != nullptr && whole && aligned(first.at<S>(at))) {
      copy_async<16>(to, first.at<S>(at));
    } else {
      S* numbers = reinterpret_cast<S*>(to);
      Lines further = find;
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

template <class S, bool kRows, int kColumns>
__device__ __forceinline__ void load_coefficients(const Coefficients& from, const double* given,
                                                  int64_t start, int64_t rank, int64_t column,
                                                  int64_t used, double* to) {
  constexpr int kHere = kLines<S>;
#pragma unroll 2
  for (int i = 0; i < kHere * kColumns / kThreads; ++i) {
    const int number = static_cast<int>(threadIdx.x) + i * kThreads;
    // Neighbours in memory go to neighbouring threads.
    const int line = kRows ? number % kHere : number / kColumns;
    const int c = kRows ? number / kHere : number % kColumns;
    double* place = to + row_of<S, !kRows>(line) * kPitch<kColumns> + c;
    if (start + line < rank && column + c < used) {
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

template <class S, bool kRows, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks)
    combine_tiles(Factors x, Coefficients coefficients, int64_t width, S* out) {
  constexpr int kE = kUnit<S>;
  constexpr int kSlices = kE < 4 ? kE : 4;
  const int64_t depth_tiles = (x.depth + kDepths - 1) / kDepths;
  const int64_t column_tiles = (width + kColumns - 1) / kColumns;
  const int64_t column = blockIdx.x % column_tiles * kColumns;
  const int64_t depth = blockIdx.x / column_tiles % depth_tiles * kDepths;
  const int64_t module = blockIdx.x / column_tiles / depth_tiles;

  int64_t used = coefficients.columns < width ? coefficients.columns : width;
  if (coefficients.ranks != nullptr && coefficients.ranks[module] < used) {
    used = coefficients.ranks[module];
  }
  const int columns = used - column < kColumns ? static_cast<int>(used - column) : kColumns;
  const int count = columns <= 0 ? 0 : static_cast<int>((x.rank + kLines<S> - 1) / kLines<S>);
  const double* from = coefficients.data + module * coefficients.module_stride;
  Lines find(x, module);
  const auto load = [&](int chunk) {
    if (chunk < count) {
      char* stage = shared_memory<char>() + chunk % kStages * kStageBytes<S, kColumns>;
      const int64_t start = static_cast<int64_t>(chunk) * kLines<S>;
      load_factors<S, kRows>(x, find, start, depth, stage);
      load_coefficients<S, kRows, kColumns>(coefficients, from, start, x.rank, column, used,
                                            reinterpret_cast<double*>(stage + kTileBytes<S>));
    }
    copy_commit();
  };

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  double sum[2][kColumns / 8][4] = {};
  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
  for (int chunk = 0; chunk < count; ++chunk) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(chunk + kStages - 1);
    const char* stage = shared_memory<char>() + chunk % kStages * kStageBytes<S, kColumns>;
    const double* rows = reinterpret_cast<const double*>(stage + kTileBytes<S>);
#pragma unroll
    for (int step = 0; step < kSteps<S>; ++step) {
      S raw[4][kE];
      read_fragments<S, !kRows, kDepths, kSteps<S>>(stage, warp, step, raw);
#pragma unroll
      for (int first = 0; first < kE; first += kSlices) {
        double a[2][2 * kSlices];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int s = 0; s < kSlices; ++s) {
            a[i][2 * s] = widen<double>(raw[2 * i][first + s]);
            a[i][2 * s + 1] = widen<double>(raw[2 * i + 1][first + s]);
          }
        }
        const double* row = rows + (4 * (step * kE + first) + t) * kPitch<kColumns> + g;
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
  }

  out += module * x.depth * width;
  const int64_t first = depth + warp * 32;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const int64_t c = column + 8 * j + 2 * t;
    if constexpr (kRows) {
      // The A side: a lane's lines lie together, four of them, or two and two in float64.
      constexpr int kRun = kE == 2 ? 2 : 4;
#pragma unroll
      for (int part = 0; part < 8 / kRun; ++part) {
        const int block = part * kRun % 4;
        const int e = part * kRun / 4;
        const int64_t at = first + line_of<S, false>(block, g);
        S run[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          run[i] = narrow<S>(sum[(block + i) / 2][j][(block + i) % 2 * 2 + e]);
        }
        if (c + e < width) store_run(run, out + (c + e) * x.depth + at, x.depth - at);
      }
    } else {
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        const int64_t at = first + 8 * block + g;
        const S run[2] = {narrow<S>(sum[block / 2][j][block % 2 * 2]),
                          narrow<S>(sum[block / 2][j][block % 2 * 2 + 1])};
        if (at < x.depth) store_run(run, out + at * width + c, width - c);
      }
    }
  }
}

template <class S, bool kRows, int kColumns>
void run(const Factors& x, const Coefficients& coefficients, int64_t width, void* out,
         Stream stream) {
  const int64_t blocks =
      x.modules * ((x.depth + kDepths - 1) / kDepths) * ((width + kColumns - 1) / kColumns);
  launch(combine_tiles<S, kRows, kColumns>, dim3(static_cast<unsigned>(blocks)), kThreads,
         kStages * kStageBytes<S, kColumns>, stream, x, coefficients, width, static_cast<S*>(out));
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
