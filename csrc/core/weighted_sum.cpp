#include "weighted_sum.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fedlora {
namespace {

constexpr int64_t kTask = 1 << 15;  // elements of the result per task: 128 KiB in float32

constexpr double kBandwidth = 10;  // bytes a nanosecond of one thread

}  // namespace

double weighted_sum_nanoseconds(DType dtype, const Runs& runs) {
  const int64_t elements = (runs.count + 1) * runs.rows * runs.columns;
  return static_cast<double>(elements * bytes_of(dtype)) / kBandwidth;
}

void weighted_sum(DType dtype, const Runs& runs, const double* weights, int threads, void* out) {
  const Kernels& kernel = kernels();
  const int64_t bytes = bytes_of(dtype);
  bool contiguous = true;
  for (int64_t k = 0; k < runs.count; ++k) contiguous &= runs.strides[k] == runs.columns;
  // Contiguous sources are one long run; others are taken row by row.
  const int64_t rows = contiguous ? 1 : runs.rows;
  const int64_t columns = contiguous ? runs.rows * runs.columns : runs.columns;
  const int64_t pieces = rows > 1 ? 1 : (columns + kTask - 1) / kTask;
  const int64_t batch = rows > 1 ? std::max<int64_t>(1, kTask / std::max<int64_t>(columns, 1)) : 1;
  const int64_t tasks = rows > 1 ? (rows + batch - 1) / batch : pieces;
  parallel_for(tasks, team(weighted_sum_nanoseconds(dtype, runs), threads), [&](int64_t task) {
    const int64_t start = rows > 1 ? 0 : task * kTask;
    const int64_t count = rows > 1 ? columns : std::min(kTask, columns - start);
    const int64_t last = rows > 1 ? std::min(rows, (task + 1) * batch) : 1;
    std::vector<const void*> sources(static_cast<size_t>(runs.count));
    for (int64_t row = rows > 1 ? task * batch : 0; row < last; ++row) {
      for (int64_t k = 0; k < runs.count; ++k) {
        sources[k] =
            static_cast<const char*>(runs.sources[k]) + (row * runs.strides[k] + start) * bytes;
      }
      kernel.weighted_sum(dtype, sources.data(), weights, runs.count, count,
                          static_cast<char*>(out) + (row * columns + start) * bytes);
    }
  });
}

}  // namespace fedlora
