// Tiles of factors: from global memory, wherever clients' tensors lie, through shared memory into
// the registers of tensor-core products.
//
// A tile has `lines` x K numbers: sums run over K, a line is a row or column of the result. Memory
// is read 16 bytes (a unit, E = 16 / sizeof(S) numbers) at a time, asynchronously where a unit is
// aligned and whole, number by number elsewhere; numbers outside are zero. A tile in shared memory:
//
//   along K     [line][K], 64 * kSteps bytes a line. Lane 4 g + t reads unit t of a step of line g:
//               its E numbers are E slices of K. With kSteps = 2 lines are 128 bytes, and units of
//               odd lines change places with those 4 further, so that 8 lanes see 32 banks.
//   across      [K][line]. Lane 4 g + t reads, for slice s, 4 lines at K = 4 s + t. Unit u stands
//               at u ^ 2 (K mod 4): the 4 t of a quarter warp see different banks.
//
// Either way a lane gets raw[j][s]: line line_of(j, g), slice s, what mma.cuh asks for. Which
// numbers make a slice differs, and does not matter to the sum as long as both operands agree.
#pragma once

#include "factors.h"
#include "mma.cuh"

namespace fedlora::cuda {

template <class S>
constexpr int kUnit = 16 / static_cast<int>(sizeof(S));  // E

// Where one line begins and how far apart its numbers are, in bytes.
struct Line {
  const char* first;  // null beyond the last line
  int64_t step;

  template <class S>
  __device__ const S* at(int64_t depth) const {
    return reinterpret_cast<const S*>(first + depth * step);
  }
};

// Finds lines; quickest where they are asked for in ascending order.
template <class S, bool kRows>
class Lines {
 public:
  __device__ Lines(const Factors& x, int64_t module) : x_(x), next_(static_cast<int>(x.rank)) {
    if (x.pieces == nullptr) {
      stride_ = x.stride * kSize;
      zeroth_ = reinterpret_cast<uintptr_t>(x.data) + module * x.module_stride * kSize;
    } else {
      table_ = x.pieces + module * x.count;
      go_to(0);
    }
  }

  __device__ Line operator()(int64_t line) {
    if (line >= x_.rank) return {nullptr, 0};
    while (line >= next_) go_to(index_ + 1);
    return {reinterpret_cast<const char*>(zeroth_ + line * (kRows ? stride_ : kSize)),
            kRows ? kSize : stride_};
  }

  // Whether `count` lines from the one last asked for on lie in one piece.
  __device__ bool together(int64_t line, int count) const { return line + count <= next_; }

  // Goes straight to the piece of a line, where there are many before it.
  __device__ void seek(int64_t line) {
    if (table_ == nullptr || line >= x_.rank) return;
    int low = 0;
    int high = static_cast<int>(x_.count);
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (table_[middle].start <= line) {
        low = middle;
      } else {
        high = middle;
      }
    }
    go_to(low);
  }

 private:
  static constexpr int64_t kSize = sizeof(S);

  __device__ void go_to(int index) {
    const Piece& piece = table_[index];
    index_ = index;
    stride_ = piece.stride * kSize;
    zeroth_ = reinterpret_cast<uintptr_t>(piece.data) - piece.start * (kRows ? stride_ : kSize);
    next_ = static_cast<int>(index + 1 < x_.count ? table_[index + 1].start : x_.rank);
  }

  const Factors& x_;
  const Piece* table_ = nullptr;
  uintptr_t zeroth_ = 0;  // where line 0 would begin if the piece had the lines before its own
  int64_t stride_ = 0;    // of the piece, in bytes
  int index_ = 0;
  int next_;  // first line of the next piece
};

__device__ __forceinline__ bool aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Where unit u of a line (of a K) stands in a tile, in bytes.
template <int kSteps>
__device__ __forceinline__ int place_along(int line, int unit) {
  return (line * 4 * kSteps + (kSteps == 2 ? unit ^ ((line & 1) << 2) : unit)) * 16;
}
template <class S, int kLines>
__device__ __forceinline__ int place_across(int k, int unit) {
  return (k * (kLines / kUnit<S>)+(unit ^ ((k & 3) << 1))) * 16;
}

// Which of a warp's 32 lines is number g of its 8-line block j.
template <class S, bool kAlong>
__device__ __forceinline__ int line_of(int j, int g) {
  if constexpr (kAlong) {
    return 8 * j + g;
  } else if constexpr (kUnit<S> == 2) {
    return 16 * (j / 2) + 2 * g + j % 2;
  } else {
    return 4 * g + j;
  }
}

// Numbers that are read with one instruction.
template <class S, int kCount>
struct alignas(kCount * sizeof(S)) Numbers {
  S at[kCount];
};
template <class S, int kCount>
__device__ __forceinline__ Numbers<S, kCount> read(const char* from) {
  return *reinterpret_cast<const Numbers<S, kCount>*>(from);
}

// A lane's share of 32 lines, from line 32 * `region` on, of kCount slices of a tile across.
template <class S, int kLines, int kCount>
__device__ __forceinline__ void read_slices(const char* tile, int region, int first,
                                            S (&raw)[4][kCount]) {
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const int k = 4 * (first + s) + t;
    if constexpr (kUnit<S> == 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto unit = read<S, 2>(tile + place_across<S, kLines>(k, 16 * region + 8 * half + g));
        raw[2 * half][s] = unit.at[0];
        raw[2 * half + 1][s] = unit.at[1];
      }
    } else {
      constexpr int kShare = kUnit<S> / 4;  // lanes that share a unit
      const auto four = read<S, 4>(
          tile + place_across<S, kLines>(k, 8 / kShare * region + g / kShare) + g % kShare * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) raw[j][s] = four.at[j];
    }
  }
}

// The same of the 4 E numbers of a step, either way.
template <class S, bool kAlong, int kLines, int kSteps>
__device__ __forceinline__ void read_fragments(const char* tile, int region, int step,
                                               S (&raw)[4][kUnit<S>]) {
  constexpr int kE = kUnit<S>;
  if constexpr (kAlong) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int line = 32 * region + 8 * j + lane / 4;
      const auto unit = read<S, kE>(tile + place_along<kSteps>(line, 4 * step + lane % 4));
#pragma unroll
      for (int s = 0; s < kE; ++s) raw[j][s] = unit.at[s];
    }
  } else {
    read_slices<S, kLines>(tile, region, kE * step, raw);
  }
}

// Two 16-bit numbers in a register.
template <class S>
__device__ __forceinline__ uint32_t packed(S low, S high) {
  union {
    S numbers[2];
    uint32_t bits;
  } both;
  both.numbers[0] = low;
  both.numbers[1] = high;
  return both.bits;
}

}  // namespace fedlora::cuda
