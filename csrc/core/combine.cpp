#include "combine.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace fedlora {
namespace {

constexpr int64_t kRun = 512;    // rows of B or columns of A per task
constexpr int64_t kRowTile = 8;  // right() reads Y in tiles of so many rows

}  // namespace

void combine_left(const Factors& b, const double* x, int64_t used, int64_t width, bool single,
                  int threads, void* out) {
  const Kernels& kernel = kernels();
  single = single && b.dtype != DType::fp64;
  const Buffer<double> packed(kernel.packed_size(b.rank, used));
  kernel.pack_left(x, b.rank, used, single, packed.get());
  parallel_for((b.depth + kRun - 1) / kRun, threads, [&](int64_t task) {
    const Buffer<std::byte> scratch(static_cast<int64_t>(kernel.combine_scratch(b.rank)));
    kernel.left(b, packed.get(), used, single, task * kRun, std::min(b.depth, (task + 1) * kRun),
                out, width, scratch.get());
  });
}

void combine_right(const Factors& a, const double* y, int64_t used, int64_t width, bool single,
                   int threads, void* out) {
  const Kernels& kernel = kernels();
  single = single && a.dtype != DType::fp64;
  const int64_t size = used * a.rank;
  const Buffer<double> padded((used + kRowTile) * a.rank);
  if (single) {
    float* to = reinterpret_cast<float*>(padded.get());
    std::copy_n(y, size, to);
    std::fill_n(to + size, kRowTile * a.rank, 0.0F);
  } else {
    std::copy_n(y, size, padded.get());
    std::fill_n(padded.get() + size, kRowTile * a.rank, 0.0);
  }
  parallel_for((a.depth + kRun - 1) / kRun, threads, [&](int64_t task) {
    const Buffer<std::byte> scratch(static_cast<int64_t>(kernel.combine_scratch(a.rank)));
    kernel.right(a, padded.get(), used, single, task * kRun, std::min(a.depth, (task + 1) * kRun),
                 out, scratch.get());
  });
  const int64_t row = a.depth * bytes_of(a.dtype);
  std::memset(static_cast<char*>(out) + used * row, 0, static_cast<size_t>((width - used) * row));
}

}  // namespace fedlora
