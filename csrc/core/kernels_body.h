// The kernels of one instruction set; included by kernels_<set>.cpp with FEDLORA_VECTOR_BYTES.
//
//   register tile   ROWS x (VECTORS vectors):  tile[i, :] += a[i, k] * b[k, :]
//   gram            both operands come from one packed panel, tiles of the upper triangle only
//   left, right     B X and Y A; the coefficients are packed once, the adapters strip by strip
//
// A panel holds 1 KiB per packed column (128 float64 or 256 float32 terms): at R = 512 that is 512
// KiB, half of a 1 MiB L2, and the tile's own columns (16 KiB) stay in L1. Everything sits in an
// unnamed namespace: two instruction sets must never share an inline function.
#include <cstring>

#include "kernels.h"
#include "number.h"

#if defined(__clang__)
#define FEDLORA_UNROLL _Pragma("unroll")
#else
#define FEDLORA_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fedlora {
namespace {

constexpr int64_t kRows = FEDLORA_TILE_ROWS;
constexpr int64_t kVectors = FEDLORA_TILE_VECTORS;
constexpr int64_t kPanelBytes = 1024;
constexpr int64_t kStrip = 64;

template <class T>
using Vector [[gnu::vector_size(FEDLORA_VECTOR_BYTES), gnu::aligned(alignof(T)), gnu::may_alias]] =
    T;

template <class T>
constexpr int64_t kLanes = FEDLORA_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

using Wide = Vector<double>;
constexpr int64_t kWide = kLanes<double>;

template <class T>
constexpr int64_t kColumns = kVectors * kLanes<T>;

template <class T>
constexpr int64_t kDepth = kPanelBytes / static_cast<int64_t>(sizeof(T));

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// tile [kRows, kColumns] = sum_k a[i * a_row + k * a_step] * b[k * kColumns + j]
template <class T>
[[gnu::always_inline]] inline void multiply(int64_t depth, const T* a, int64_t a_row,
                                            int64_t a_step, const T* b, T* tile) {
  Vector<T> sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> right[kVectors];
    FEDLORA_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) {
      right[v] = *reinterpret_cast<const Vector<T>*>(b + v * kLanes<T>);
    }
    FEDLORA_UNROLL
    for (int64_t i = 0; i < kRows; ++i) {
      const T left = a[i * a_row];
      FEDLORA_UNROLL
      for (int64_t v = 0; v < kVectors; ++v) sum[i][v] += right[v] * left;
    }
    a += a_step;
    b += kColumns<T>;
  }
  FEDLORA_UNROLL
  for (int64_t i = 0; i < kRows; ++i) {
    FEDLORA_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) {
      *reinterpret_cast<Vector<T>*>(tile + i * kColumns<T> + v * kLanes<T>) = sum[i][v];
    }
  }
}

// Widening

template <class S, class T>
[[gnu::always_inline]] inline void convert(const S* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(wide(from[i]));
}

// One row of `columns` packed columns: to[tile][k][lane], `tile` elements between tiles.
template <class S, class T>
void scatter(const S* from, int64_t count, int64_t column, int64_t tile, T* to) {
  while (count > 0) {
    const int64_t lane = column % kColumns<T>;
    T* place = to + column / kColumns<T> * tile + lane;
    const int64_t run = count < kColumns<T> - lane ? count : kColumns<T> - lane;
    if (run == kColumns<T>) {
      convert(from, kColumns<T>, place);
    } else {
      convert(from, run, place);
    }
    from += run, column += run, count -= run;
  }
}

using Eight [[gnu::vector_size(32), gnu::aligned(4), gnu::may_alias]] = float;

// to[k * step + i] = from[i][k] for an 8 x 8 block. Every type but float64 is exact in float32, so
// the transposition always runs on float32 and widens on the way out.
template <class S, class T>
[[gnu::always_inline]] inline void transpose_block(const S* const* from, int64_t offset, T* to,
                                                   int64_t step) {
  Eight x[8], y[8];
  FEDLORA_UNROLL
  for (int i = 0; i < 8; ++i) {
    float row[8];
    convert(from[i] + offset, 8, row);
    std::memcpy(&x[i], row, sizeof(row));
  }
  FEDLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    y[2 * i + 1] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  FEDLORA_UNROLL
  for (int i = 0; i < 8; i += 4) {
    x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    x[i + 1] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    x[i + 2] = __builtin_shufflevector(y[i + 1], y[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    x[i + 3] = __builtin_shufflevector(y[i + 1], y[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  FEDLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Eight low = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const Eight high = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    FEDLORA_UNROLL
    for (int j = 0; j < 8; ++j) {
      to[i * step + j] = static_cast<T>(low[j]);
      to[(i + 4) * step + j] = static_cast<T>(high[j]);
    }
  }
}

// Packed panels of the terms [start, start + depth): panel[tile][k][lane].

template <class S, class T>
void pack_columns(const Factors& x, int64_t start, int64_t depth, int64_t columns, T* panel) {
  int64_t column = 0;
  for (const Part* part = x.parts; part < x.parts + x.count && column < columns; ++part) {
    const int64_t count = part->rank < columns - column ? part->rank : columns - column;
    for (int64_t k = 0; k < depth; ++k) {
      scatter(static_cast<const S*>(x.at(*part, start + k, 0)), count, column, depth * kColumns<T>,
              panel + k * kColumns<T>);
    }
    column += count;
  }
  const int64_t used = column % kColumns<T>;
  if (used == 0) return;
  T* last = panel + column / kColumns<T> * depth * kColumns<T>;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t lane = used; lane < kColumns<T>; ++lane) last[k * kColumns<T> + lane] = 0;
  }
}

template <class S, class T>
void pack_rows(const Factors& x, int64_t start, int64_t depth, int64_t columns, T* panel) {
  const Part* part = x.parts;
  int64_t inside = 0;
  for (int64_t column = 0; column < round_up(columns, kColumns<T>); column += 8) {
    const S* rows[8];
    int64_t have = 0;
    for (; have < 8 && column + have < columns; ++have, ++inside) {
      for (; inside == part->rank; ++part) inside = 0;
      rows[have] = static_cast<const S*>(x.at(*part, inside, start));
    }
    T* to = panel + column / kColumns<T> * depth * kColumns<T> + column % kColumns<T>;
    int64_t k = 0;
    if constexpr (sizeof(S) < 8) {
      for (; have == 8 && k + 8 <= depth; k += 8) {
        transpose_block(rows, k, to + k * kColumns<T>, kColumns<T>);
      }
    }
    for (; k < depth; ++k) {
      for (int64_t i = 0; i < 8; ++i) {
        to[k * kColumns<T> + i] = i < have ? static_cast<T>(wide(rows[i][k])) : T(0);
      }
    }
  }
}

template <class S, class T>
void gram_of(const Factors& x, int64_t first, int64_t last, double* g, T* panel) {
  const int64_t rank = x.rank;
  const int64_t columns = last * kColumns<T> < rank ? last * kColumns<T> : rank;
  alignas(64) T tile[kRows * kColumns<T>];
  for (int64_t start = 0; start < x.depth; start += kDepth<T>) {
    const int64_t depth = kDepth<T> < x.depth - start ? kDepth<T> : x.depth - start;
    if (x.rows) {
      pack_rows<S>(x, start, depth, columns, panel);
    } else {
      pack_columns<S>(x, start, depth, columns, panel);
    }
    for (int64_t t = first; t < last; ++t) {
      const int64_t column = t * kColumns<T>;
      const int64_t width = kColumns<T> < rank - column ? kColumns<T> : rank - column;
      for (int64_t row = 0; row < column + width; row += kRows) {
        const T* left = panel + row / kColumns<T> * depth * kColumns<T> + row % kColumns<T>;
        multiply<T>(depth, left, 1, kColumns<T>, panel + column * depth, tile);
        const int64_t height = kRows < rank - row ? kRows : rank - row;
        for (int64_t i = 0; i < height; ++i) {
          double* to = g + (row + i) * rank + column;
          for (int64_t j = 0; j < width; ++j) to[j] += tile[i * kColumns<T> + j];
        }
      }
    }
  }
}

template <class F>
[[gnu::always_inline]] inline void with_type(DType dtype, F function) {
  switch (dtype) {
    case DType::bf16:
      return function(BFloat16{});
    case DType::fp16:
      return function(Float16{});
    case DType::fp32:
      return function(0.0F);
    case DType::fp64:
      return function(0.0);
  }
}

void gram(const Factors& x, bool fast, int64_t first, int64_t last, double* g, void* scratch) {
  with_type(x.dtype, [&](auto sample) {
    using S = decltype(sample);
    if constexpr (sizeof(S) < 8) {
      if (fast) {
        return gram_of<S>(x, first, last, g, static_cast<float*>(scratch));
      }
    }
    gram_of<S>(x, first, last, g, static_cast<double*>(scratch));
  });
}

size_t gram_scratch(int64_t rank) {
  return static_cast<size_t>(round_up(rank, kColumns<float>) * kPanelBytes);
}

// Combining

int64_t packed_size(int64_t rank, int64_t width) { return rank * round_up(width, kColumns<float>); }

template <class T>
void pack_coefficients(const double* x, int64_t rank, int64_t width, T* packed) {
  for (int64_t column = 0; column < width; column += kColumns<T>) {
    T* to = packed + column * rank;
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t j = 0; j < kColumns<T>; ++j) {
        to[k * kColumns<T> + j] =
            column + j < width ? static_cast<T>(x[k * width + column + j]) : T(0);
      }
    }
  }
}

void pack_left(const double* x, int64_t rank, int64_t width, bool single, void* packed) {
  if (single) {
    pack_coefficients(x, rank, width, static_cast<float*>(packed));
  } else {
    pack_coefficients(x, rank, width, static_cast<double*>(packed));
  }
}

template <class S, class T>
void left_of(const Factors& b, const T* packed, int64_t width, int64_t first, int64_t last, S* out,
             int64_t stride, T* rows) {
  const int64_t rank = b.rank;
  alignas(64) T tile[kRows * kColumns<T>];
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t height = kRows < last - row ? kRows : last - row;
    for (int64_t i = 0; i < height; ++i) {
      T* to = rows + i * rank;
      for (const Part* part = b.parts; part < b.parts + b.count; to += part->rank, ++part) {
        convert(static_cast<const S*>(b.at(*part, row + i, 0)), part->rank, to);
      }
      for (int64_t j = width; j < stride; ++j) out[(row + i) * stride + j] = narrow<S>(T(0));
    }
    for (int64_t column = 0; column < width; column += kColumns<T>) {
      multiply<T>(rank, rows, rank, 1, packed + column * rank, tile);
      const int64_t count = kColumns<T> < width - column ? kColumns<T> : width - column;
      for (int64_t i = 0; i < height; ++i) {
        S* to = out + (row + i) * stride + column;
        for (int64_t j = 0; j < count; ++j) to[j] = narrow<S>(tile[i * kColumns<T> + j]);
      }
    }
  }
}

void left(const Factors& b, const void* packed, int64_t width, bool single, int64_t first,
          int64_t last, void* out, int64_t stride, void* scratch) {
  with_type(b.dtype, [&](auto sample) {
    using S = decltype(sample);
    if (single) {
      left_of(b, static_cast<const float*>(packed), width, first, last, static_cast<S*>(out),
              stride, static_cast<float*>(scratch));
    } else {
      left_of(b, static_cast<const double*>(packed), width, first, last, static_cast<S*>(out),
              stride, static_cast<double*>(scratch));
    }
  });
}

template <class S, class T>
void right_of(const Factors& a, const T* y, int64_t height, int64_t first, int64_t last, S* out,
              T* strip) {
  const int64_t rank = a.rank;
  alignas(64) T tile[kRows * kColumns<T>];
  for (int64_t start = first; start < last; start += kStrip) {
    const int64_t strip_width = kStrip < last - start ? kStrip : last - start;
    int64_t k = 0;
    for (const Part* part = a.parts; part < a.parts + a.count; ++part) {
      for (int64_t i = 0; i < part->rank; ++i, ++k) {
        scatter(static_cast<const S*>(a.at(*part, i, start)), strip_width, 0, rank * kColumns<T>,
                strip + k * kColumns<T>);
      }
    }
    for (int64_t column = 0; column < strip_width; column += kColumns<T>) {
      const int64_t count = kColumns<T> < strip_width - column ? kColumns<T> : strip_width - column;
      for (int64_t row = 0; row < height; row += kRows) {
        multiply<T>(rank, y + row * rank, rank, 1, strip + column * rank, tile);
        for (int64_t i = 0; i < kRows && row + i < height; ++i) {
          S* to = out + (row + i) * a.depth + start + column;
          for (int64_t j = 0; j < count; ++j) to[j] = narrow<S>(tile[i * kColumns<T> + j]);
        }
      }
    }
  }
}

void right(const Factors& a, const void* y, int64_t height, bool single, int64_t first,
           int64_t last, void* out, void* scratch) {
  with_type(a.dtype, [&](auto sample) {
    using S = decltype(sample);
    if (single) {
      right_of(a, static_cast<const float*>(y), height, first, last, static_cast<S*>(out),
               static_cast<float*>(scratch));
    } else {
      right_of(a, static_cast<const double*>(y), height, first, last, static_cast<S*>(out),
               static_cast<double*>(scratch));
    }
  });
}

size_t combine_scratch(int64_t rank) {
  return static_cast<size_t>(rank * round_up(kStrip, kColumns<float>)) * sizeof(double);
}

// Averages

// As many consecutive numbers as a register of float64 holds, widened exactly.
template <class T>
using Lanes [[gnu::vector_size(FEDLORA_VECTOR_BYTES / 8 * sizeof(T)), gnu::aligned(alignof(T)),
              gnu::may_alias]] = T;

inline Wide load(const double* from) { return *reinterpret_cast<const Wide*>(from); }
inline Wide load(const float* from) {
  return __builtin_convertvector(*reinterpret_cast<const Lanes<float>*>(from), Wide);
}
inline Lanes<uint32_t> load_bits(const void* from) {
  return __builtin_convertvector(*static_cast<const Lanes<uint16_t>*>(from), Lanes<uint32_t>);
}
inline Wide load(const BFloat16* from) {
  const Lanes<uint32_t> bits = load_bits(from) << 16;
  return __builtin_convertvector(reinterpret_cast<Lanes<float>>(bits), Wide);
}
inline Wide load(const Float16* from) {
  const Lanes<uint32_t> bits = load_bits(from);
  const Lanes<uint32_t> size = (bits & 0x7FFFU) << 13;
  const Lanes<float> finite = reinterpret_cast<Lanes<float>>(size) * 0x1p112F;
  const Lanes<uint32_t> special =
      reinterpret_cast<Lanes<uint32_t>>(size >= 0x0F800000U) & 0x7F800000U;
  const Lanes<uint32_t> all =
      reinterpret_cast<Lanes<uint32_t>>(finite) | special | (bits & 0x8000U) << 16;
  return __builtin_convertvector(reinterpret_cast<Lanes<float>>(all), Wide);
}

inline void store(Wide value, double* to) { *reinterpret_cast<Wide*>(to) = value; }
inline void store(Wide value, float* to) {
  *reinterpret_cast<Lanes<float>*>(to) = __builtin_convertvector(value, Lanes<float>);
}
constexpr int64_t kSums = 8;  // registers of sums: a source costs one load and no store

// kSums registers of sums; source(k) gives client k's numbers.
template <class S, class Source>
[[gnu::always_inline]] inline void weighted_block(const double* weights, int64_t clients,
                                                  const Source& source, S* out) {
  Wide sums[kSums] = {};
  for (int64_t k = 0; k < clients; ++k) {
    const S* from = source(k);
    FEDLORA_UNROLL
    for (int64_t v = 0; v < kSums; ++v) sums[v] += load(from + v * kWide) * weights[k];
  }
  if constexpr (sizeof(S) > 2) {
    FEDLORA_UNROLL
    for (int64_t v = 0; v < kSums; ++v) store(sums[v], out + v * kWide);
  } else {
    double wide[kSums * kWide];
    FEDLORA_UNROLL
    for (int64_t v = 0; v < kSums; ++v) store(sums[v], wide + v * kWide);
    for (int64_t i = 0; i < kSums * kWide; ++i) out[i] = narrow<S>(wide[i]);
  }
}

void weighted_sum(DType dtype, const void* const* sources, const double* weights, int64_t clients,
                  int64_t count, void* out) {
  with_type(dtype, [&](auto sample) {
    using S = decltype(sample);
    S* to = static_cast<S*>(out);
    int64_t i = 0;
    for (; i + kSums * kWide <= count; i += kSums * kWide) {
      weighted_block<S>(
          weights, clients, [&](int64_t k) { return static_cast<const S*>(sources[k]) + i; },
          to + i);
    }
    if (i == count) return;
    // The rest by the same instructions, so that a number's bits do not depend on its place.
    S part[kSums * kWide] = {};
    S result[kSums * kWide];
    const auto bytes = static_cast<size_t>(count - i) * sizeof(S);
    weighted_block<S>(
        weights, clients,
        [&](int64_t k) {
          std::memcpy(part, static_cast<const S*>(sources[k]) + i, bytes);
          return part;
        },
        result);
    std::memcpy(to + i, result, bytes);
  });
}

void widen(DType dtype, const void* x, int64_t count, double* to) {
  with_type(dtype,
            [&](auto sample) { convert(static_cast<const decltype(sample)*>(x), count, to); });
}

void narrow_all(DType dtype, const double* from, int64_t count, void* x) {
  with_type(dtype, [&](auto sample) {
    using S = decltype(sample);
    for (int64_t i = 0; i < count; ++i) static_cast<S*>(x)[i] = narrow<S>(from[i]);
  });
}

// Small symmetric eigenproblems

constexpr int64_t kTogether = 4;  // rows or columns that share what they load
constexpr int64_t kBlock = kTogether > kWide ? kTogether : kWide;

inline double total(Wide sums) {
  double sum = 0;
  for (int64_t lane = 0; lane < kWide; ++lane) sum += sums[lane];
  return sum;
}

inline double dot(const double* x, const double* y, int64_t count) {
  Wide sums = {};
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    sums += *reinterpret_cast<const Wide*>(x + i) * *reinterpret_cast<const Wide*>(y + i);
  }
  double sum = total(sums);
  for (; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

void add_products(const int64_t* ranks, int64_t clients, const double* b, const double* a,
                  double* products) {
  for (int64_t client = 0; client < clients; ++client) {
    products[client] += dot(b, a, ranks[client]);
    b += ranks[client];
    a += ranks[client];
  }
}

struct Beside {  // a block on the diagonal: both its triangles are there
  static constexpr bool kBelow = false;
};
struct Right {
  static constexpr bool kBelow = true;
};

// kCount rows of the upper triangle from row `row` on, in whole blocks of kBlock x kBlock beside
// the diagonal: a -= v w^T + w v^T there, then image += a next, what lies right of the diagonal
// block for the rows below too.
template <int64_t kCount>
[[gnu::always_inline]] inline void update_rows(int64_t n, int64_t row, double* a, const double* v,
                                               const double* w, const double* next, double* image) {
  const int64_t start = row / kBlock * kBlock;
  const int64_t end = start + kBlock < n ? start + kBlock : n;
  a += row * n;
  Wide sums[kCount] = {};
  double rest[kCount] = {};
  const auto pass = [&](int64_t from, int64_t to, auto place_of) __attribute__((always_inline)) {
    constexpr bool kBelow = decltype(place_of)::kBelow;
    int64_t j = from;
    for (; j + kWide <= to; j += kWide) {
      const Wide left = *reinterpret_cast<const Wide*>(v + j);
      const Wide right = *reinterpret_cast<const Wide*>(w + j);
      const Wide onto = *reinterpret_cast<const Wide*>(next + j);
      Wide down = *reinterpret_cast<const Wide*>(image + j);
      FEDLORA_UNROLL
      for (int64_t i = 0; i < kCount; ++i) {
        Wide* place = reinterpret_cast<Wide*>(a + i * n + j);
        const Wide value = *place - right * v[row + i] - left * w[row + i];
        *place = value;
        sums[i] += value * onto;
        if (kBelow) down += value * next[row + i];
      }
      if (kBelow) *reinterpret_cast<Wide*>(image + j) = down;
    }
    for (; j < to; ++j) {
      for (int64_t i = 0; i < kCount; ++i) {
        const double value = a[i * n + j] - w[j] * v[row + i] - v[j] * w[row + i];
        a[i * n + j] = value;
        rest[i] += value * next[j];
        if (kBelow) image[j] += value * next[row + i];
      }
    }
  };
  pass(start, end, Beside{});
  pass(end, n, Right{});
  for (int64_t i = 0; i < kCount; ++i) image[row + i] += total(sums[i]) + rest[i];
}

// Householder's reduction. The update of one step, v w^T + w v^T, and the product of the next, A
// times its reflector, pass over the upper triangle together.
void tridiagonal(int64_t n, double* a, double* diagonal, double* beside, double* tau,
                 double* scratch) {
  const int64_t length = round_up(n, 8);
  double* v = scratch;  // zero up to the row they start in, as are w and next
  double* w = v + length;
  double* next = w + length;
  double* image = next + length;
  for (int64_t i = 0; i < 4 * length; ++i) scratch[i] = 0;
  for (int64_t k = 0; k < n; ++k) {
    double* row = a + k * n;
    for (int64_t j = k; j < n; ++j) row[j] = row[j] - w[j] * v[k] - v[j] * w[k];
    diagonal[k] = row[k];
    tau[k] = 0;
    next[k] = 0;
    if (k + 1 == n) break;
    const int64_t first = k + 1;
    const double square = dot(row + first + 1, row + first + 1, n - first - 1);
    beside[k] = row[first];
    for (int64_t j = first; j < n; ++j) next[j] = 0;
    if (square > 0) {
      const double length_of = __builtin_sqrt(row[first] * row[first] + square);
      const double beta = row[first] > 0 ? -length_of : length_of;
      const double inverse = 1 / (row[first] - beta);
      tau[k] = (beta - row[first]) / beta;
      beside[k] = beta;
      next[first] = 1;
      for (int64_t j = first + 1; j < n; ++j) next[j] = row[j] = row[j] * inverse;
    }
    for (int64_t j = first; j < n; ++j) image[j] = 0;
    int64_t i = first;
    for (; i < n && i % kTogether != 0; ++i) update_rows<1>(n, i, a, v, w, next, image);
    for (; i + kTogether <= n; i += kTogether) {
      update_rows<kTogether>(n, i, a, v, w, next, image);
    }
    for (; i < n; ++i) update_rows<1>(n, i, a, v, w, next, image);
    const double along = tau[k] * tau[k] / 2 * dot(image + first, next + first, n - first);
    w[k] = 0;
    for (int64_t j = first; j < n; ++j) {
      w[j] = tau[k] * image[j] - along * next[j];
      v[j] = next[j];
    }
    v[k] = 0;
  }
}

template <int64_t kCount>
[[gnu::always_inline]] inline void reflect(int64_t count, int64_t stride, const double* v,
                                           double tau, double* c) {
  Wide sums[kCount] = {};
  double along[kCount];
  int64_t j = 0;
  for (; j + kWide <= count; j += kWide) {
    const Wide direction = *reinterpret_cast<const Wide*>(v + j);
    FEDLORA_UNROLL
    for (int64_t i = 0; i < kCount; ++i) {
      sums[i] += direction * *reinterpret_cast<const Wide*>(c + i * stride + j);
    }
  }
  for (int64_t i = 0; i < kCount; ++i) {
    along[i] = c[i * stride - 1] + total(sums[i]);
    for (int64_t t = j; t < count; ++t) along[i] += v[t] * c[i * stride + t];
    along[i] *= tau;
    c[i * stride - 1] -= along[i];
  }
  for (j = 0; j + kWide <= count; j += kWide) {
    const Wide direction = *reinterpret_cast<const Wide*>(v + j);
    FEDLORA_UNROLL
    for (int64_t i = 0; i < kCount; ++i) {
      *reinterpret_cast<Wide*>(c + i * stride + j) -= direction * along[i];
    }
  }
  for (; j < count; ++j) {
    for (int64_t i = 0; i < kCount; ++i) c[i * stride + j] -= v[j] * along[i];
  }
}

void apply_reflectors(int64_t n, int64_t count, const double* a, const double* tau, double* c) {
  for (int64_t k = n - 3; k >= 0; --k) {
    if (tau[k] == 0) continue;
    const double* v = a + k * n + k + 2;  // after its leading 1
    int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether) {
      reflect<kTogether>(n - k - 2, n, v, tau[k], c + i * n + k + 2);
    }
    for (; i < count; ++i) reflect<1>(n - k - 2, n, v, tau[k], c + i * n + k + 2);
  }
}

constexpr Kernels kTable = {
    FEDLORA_ISA_NAME,
    kColumns<double>,
    gram,
    gram_scratch,
    pack_left,
    packed_size,
    left,
    right,
    combine_scratch,
    weighted_sum,
    add_products,
    tridiagonal,
    apply_reflectors,
    widen,
    narrow_all,
};

}  // namespace
}  // namespace fedlora
