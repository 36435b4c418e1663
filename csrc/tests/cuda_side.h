// Factors for kernels in the emulator, whose device memory is the host's.
#pragma once

#include <memory>
#include <vector>

#include "cuda/factors.h"
#include "matrices.h"

namespace fedlora::tests {

// Several modules, each with memory of its own, as a table of pieces.
class CudaSide {
 public:
  CudaSide(const std::vector<Matrix>& stacked, bool rows, const std::vector<int64_t>& ranks,
           int64_t depth, DType dtype) {
    for (const Matrix& matrix : stacked) {
      sides_.push_back(std::make_unique<Side>(matrix, rows, ranks, depth, dtype));
      const Factors& from = sides_.back()->factors();
      int64_t start = 0;
      for (const Part* part = from.parts; part < from.parts + from.count; ++part) {
        pieces_.push_back({part->data, start, part->stride});
        start += part->rank;
      }
    }
    const Factors& first = sides_.front()->factors();
    factors_ = {dtype,      rows,        static_cast<int64_t>(stacked.size()),
                first.rank, first.depth, nullptr,
                0,          0,           pieces_.data(),
                first.count};
  }

  const cuda::Factors& factors() const { return factors_; }

 private:
  std::vector<std::unique_ptr<Side>> sides_;
  std::vector<cuda::Piece> pieces_;
  cuda::Factors factors_;
};

}  // namespace fedlora::tests
