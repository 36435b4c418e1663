// Arrays as the core reads them: factors as tables of parts, coefficients as float64.
#pragma once

#include <memory>
#include <vector>

#include "array.h"
#include "core/factors.h"
#include "core/memory.h"

namespace fedlora {

DType factor_type(Scalar scalar);

int64_t elements(const Sizes& sizes);
Sizes contiguous_strides(const Sizes& sizes);
bool is_contiguous(const Array& array);
bool last_is_contiguous(const Array& array);

// An array with a contiguous last dimension, or as a `whole`: itself, or a copy that lives as long
// as this object.
class Rows {
 public:
  explicit Rows(const Array& array, bool whole = false);
  const Array& array() const { return array_; }

 private:
  Array array_;
  std::shared_ptr<Buffer<char>> copy_;
};

// One side of L modules: a stack [L,R,d] or [L,d,R], or module-major lists of matrices.
class Side {
 public:
  Side(const Array& stacked, bool rows);
  Side(const Arrays& list, int64_t modules, bool rows);

  int64_t modules() const { return static_cast<int64_t>(factors_.size()); }
  const Factors& operator[](int64_t module) const { return factors_[static_cast<size_t>(module)]; }

  // The same without any module, for shapes of results.
  int64_t rank() const { return rank_; }
  int64_t depth() const { return depth_; }
  Scalar scalar() const { return scalar_; }

 private:
  std::vector<Rows> rows_;
  std::vector<Part> parts_;
  std::vector<Factors> factors_;
  int64_t rank_ = 0;
  int64_t depth_ = 0;
  Scalar scalar_;
};

// float32 or float64 values as contiguous float64; read in place where they are that already.
class Doubles {
 public:
  explicit Doubles(const Array& array);
  const double* get() const { return data_; }

 private:
  Buffer<double> copy_;
  const double* data_;
};

// The dimensions from axis `first` on as `rows` runs of `columns` contiguous elements, `stride`
// apart; not `possible` where the layout is no such thing.
struct Layout {
  int64_t rows = 1;
  int64_t columns = 1;
  int64_t stride = 1;
  bool possible = true;
};

Layout layout_of(const Array& array, int64_t first);

}  // namespace fedlora
