#include "views.h"

#include <cstring>

namespace fedlora {
namespace {

int64_t bytes_of(Scalar scalar) {
  return scalar == Scalar::int64 ? 8 : fedlora::bytes_of(factor_type(scalar));
}

// visit(offset) for every element in order, offset in elements.
template <class F>
void each_offset(const Array& array, int64_t axis, int64_t offset, const F& visit) {
  if (axis == array.dim()) return visit(offset);
  for (int64_t i = 0; i < array.size(axis); ++i) {
    each_offset(array, axis + 1, offset + i * array.stride(axis), visit);
  }
}

}  // namespace

int64_t elements(const Sizes& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

bool last_is_contiguous(const Array& array) {
  return array.dim() == 0 || array.sizes.back() <= 1 || array.strides.back() == 1;
}

bool is_contiguous(const Array& array) {
  int64_t expected = 1;
  for (int64_t axis = array.dim() - 1; axis >= 0; --axis) {
    if (array.size(axis) != 1 && array.stride(axis) != expected) return false;
    expected *= array.size(axis);
  }
  return true;
}

Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * sizes[axis];
  return strides;
}

DType factor_type(Scalar scalar) {
  switch (scalar) {
    case Scalar::bf16:
      return DType::bf16;
    case Scalar::fp16:
      return DType::fp16;
    case Scalar::fp32:
      return DType::fp32;
    default:
      return DType::fp64;
  }
}

Rows::Rows(const Array& array, bool whole) : array_(array) {
  if (whole ? is_contiguous(array) : last_is_contiguous(array)) return;
  const int64_t bytes = bytes_of(array.scalar);
  copy_ = std::make_shared<Buffer<char>>(elements(array.sizes) * bytes);
  char* to = copy_->get();
  each_offset(array, 0, 0, [&](int64_t offset) {
    std::memcpy(to, static_cast<const char*>(array.data) + offset * bytes,
                static_cast<size_t>(bytes));
    to += bytes;
  });
  array_.data = copy_->get();
  array_.strides = contiguous_strides(array.sizes);
}

Side::Side(const Array& stacked, bool rows)
    : rank_(stacked.size(rows ? 1 : 2)),
      depth_(stacked.size(rows ? 2 : 1)),
      scalar_(stacked.scalar) {
  const DType dtype = factor_type(scalar_);
  rows_.emplace_back(stacked);
  const Array& array = rows_.front().array();
  const int64_t modules = array.size(0);
  parts_.resize(static_cast<size_t>(modules));
  for (int64_t module = 0; module < modules; ++module) {
    Part& part = parts_[static_cast<size_t>(module)];
    part = {
        static_cast<const char*>(array.data) + module * array.stride(0) * fedlora::bytes_of(dtype),
        rank_, array.stride(1)};
    factors_.push_back({dtype, rows, rank_, depth_, &part, 1});
  }
}

Side::Side(const Arrays& list, int64_t modules, bool rows)
    : depth_(list[0].size(rows ? 1 : 0)), scalar_(list[0].scalar) {
  const DType dtype = factor_type(scalar_);
  const auto clients = list.size() / static_cast<size_t>(modules);
  for (size_t k = 0; k < clients; ++k) rank_ += list[k].size(rows ? 0 : 1);
  rows_.reserve(list.size());
  parts_.reserve(list.size());
  factors_.reserve(static_cast<size_t>(modules));
  for (const Array& array : list) {
    const Array& view = rows_.emplace_back(array).array();
    parts_.push_back({view.data, view.size(rows ? 0 : 1), view.stride(0)});
  }
  for (int64_t module = 0; module < modules; ++module) {
    factors_.push_back({dtype, rows, rank_, depth_,
                        parts_.data() + static_cast<size_t>(module) * clients,
                        static_cast<int64_t>(clients)});
  }
}

Doubles::Doubles(const Array& array) : data_(static_cast<const double*>(array.data)) {
  if (array.scalar == Scalar::fp64 && is_contiguous(array)) return;
  copy_ = Buffer<double>(elements(array.sizes));
  double* to = copy_.get();
  each_offset(array, 0, 0, [&](int64_t offset) {
    *to++ = array.scalar == Scalar::fp64
                ? static_cast<const double*>(array.data)[offset]
                : static_cast<double>(static_cast<const float*>(array.data)[offset]);
  });
  data_ = copy_.get();
}

Layout layout_of(const Array& array, int64_t first) {
  Layout found;
  int64_t axis = array.dim() - 1;
  for (; axis >= first; --axis) {
    if (array.size(axis) != 1 && array.stride(axis) != found.columns) break;
    found.columns *= array.size(axis);
  }
  found.stride = found.columns;
  for (; axis >= first; --axis) {
    if (array.size(axis) == 1) continue;
    if (found.rows == 1) {
      found.stride = array.stride(axis);
    } else if (array.stride(axis) != found.stride * found.rows) {
      found.possible = false;
    }
    found.rows *= array.size(axis);
  }
  return found;
}

}  // namespace fedlora
