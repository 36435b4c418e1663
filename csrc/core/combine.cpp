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

int64_t runs(const Factors& x) { return (x.depth + kRun - 1) / kRun; }

// B X, in tasks.
class Left {
 public:
  Left(const Factors& b, const double* x, int64_t used, int64_t width, bool single, void* out)
      : b_(b),
        used_(used),
        width_(width),
        single_(single && b.dtype != DType::fp64),
        packed_(kernels().packed_size(b.rank, used)),
        out_(out) {
    kernels().pack_left(x, b.rank, used, single_, packed_.get());
  }

  int64_t tasks() const { return runs(b_); }

  void run(int64_t task) const {
    const Kernels& kernel = kernels();
    const Buffer<std::byte> scratch(static_cast<int64_t>(kernel.combine_scratch(b_.rank)));
    kernel.left(b_, packed_.get(), used_, single_, task * kRun,
                std::min(b_.depth, (task + 1) * kRun), out_, width_, scratch.get());
  }

 private:
  const Factors& b_;
  const int64_t used_;
  const int64_t width_;
  const bool single_;
  const Buffer<double> packed_;
  void* const out_;
};

// Y A, in tasks.
class Right {
 public:
  Right(const Factors& a, const double* y, int64_t used, int64_t width, bool single, void* out)
      : a_(a),
        used_(used),
        single_(single && a.dtype != DType::fp64),
        padded_((used + kRowTile) * a.rank),
        out_(out) {
    const int64_t size = used * a.rank;
    if (single_) {
      float* to = reinterpret_cast<float*>(padded_.get());
      std::copy_n(y, size, to);
      std::fill_n(to + size, kRowTile * a.rank, 0.0F);
    } else {
      std::copy_n(y, size, padded_.get());
      std::fill_n(padded_.get() + size, kRowTile * a.rank, 0.0);
    }
    const int64_t row = a.depth * bytes_of(a.dtype);
    std::memset(static_cast<char*>(out) + used * row, 0, static_cast<size_t>((width - used) * row));
  }

  int64_t tasks() const { return runs(a_); }

  void run(int64_t task) const {
    const Kernels& kernel = kernels();
    const Buffer<std::byte> scratch(static_cast<int64_t>(kernel.combine_scratch(a_.rank)));
    kernel.right(a_, padded_.get(), used_, single_, task * kRun,
                 std::min(a_.depth, (task + 1) * kRun), out_, scratch.get());
  }

 private:
  const Factors& a_;
  const int64_t used_;
  const bool single_;
  const Buffer<double> padded_;
  void* const out_;
};

}  // namespace

double combine_nanoseconds(const Factors& x, int64_t used) {
  const double terms = static_cast<double>(x.rank) * static_cast<double>(x.depth);
  return terms * (0.5 + static_cast<double>(used + kRowTile / 2) / 15);
}

void combine_left(const Factors& b, const double* x, int64_t used, int64_t width, bool single,
                  int threads, void* out) {
  const Left left(b, x, used, width, single, out);
  parallel_for(left.tasks(), team(combine_nanoseconds(b, used), threads),
               [&](int64_t task) { left.run(task); });
}

void combine_right(const Factors& a, const double* y, int64_t used, int64_t width, bool single,
                   int threads, void* out) {
  const Right right(a, y, used, width, single, out);
  parallel_for(right.tasks(), team(combine_nanoseconds(a, used), threads),
               [&](int64_t task) { right.run(task); });
}

void combine(const Factors& b, const Factors& a, const Coefficients& coefficients, bool single,
             int threads, void* b_g, void* a_g) {
  const auto& [x, y, used, width] = coefficients;
  const Left left(b, x, used, width, single, b_g);
  const Right right(a, y, used, width, single, a_g);
  const double nanoseconds = combine_nanoseconds(b, used) + combine_nanoseconds(a, used);
  parallel_for(left.tasks() + right.tasks(), team(nanoseconds, threads), [&](int64_t task) {
    if (task < left.tasks()) {
      left.run(task);
    } else {
      right.run(task - left.tasks());
    }
  });
}

}  // namespace fedlora
