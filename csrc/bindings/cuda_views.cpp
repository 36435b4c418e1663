#include "cuda_views.h"

#include "cuda/copy.h"
#include "views.h"

namespace fedlora::cuda {
namespace {

int64_t bytes_of(const Array& array) {
  return array.scalar == Scalar::int64 ? 8 : fedlora::bytes_of(factor_type(array.scalar));
}

Strided strided(const Array& array) {
  if (array.dim() > kMostDimensions) {
    throw WrongValue("an array that is not contiguous has at most " +
                     std::to_string(kMostDimensions) + " dimensions, found " +
                     std::to_string(array.dim()));
  }
  Strided from = {array.data, static_cast<int>(array.dim()), {}, {}};
  for (int64_t axis = 0; axis < array.dim(); ++axis) {
    from.sizes[axis] = array.size(axis);
    from.strides[axis] = array.stride(axis);
  }
  return from;
}

Array contiguous(const Host& host, const Array& array) {
  Array copied = array;
  copied.strides = contiguous_strides(array.sizes);
  copied.data = host.device->scratch(static_cast<size_t>(elements(array.sizes) * bytes_of(array)));
  copy(strided(array), bytes_of(array), copied.data, stream_of(host));
  return copied;
}

Array with_rows(const Host& host, const Array& array) {
  return last_is_contiguous(array) ? array : contiguous(host, array);
}

template <class T>
const T* uploaded(const Host& host, const std::vector<T>& table) {
  return static_cast<const T*>(host.device->uploaded(table.data(), table.size() * sizeof(T)));
}

}  // namespace

Stream stream_of(const Host& host) {
#ifdef FEDLORA_CUDA
  return static_cast<Stream>(host.device->stream);
#else
  (void)host;
  return {};
#endif
}

Factors side(const Host& host, const Array& stacked, bool rows) {
  const Array array = with_rows(host, stacked);
  return {factor_type(array.scalar),
          rows,
          array.size(0),
          array.size(rows ? 1 : 2),
          array.size(rows ? 2 : 1),
          array.data,
          array.stride(0),
          array.stride(1),
          nullptr,
          0};
}

Factors side(const Host& host, const Arrays& list, int64_t modules, bool rows) {
  const auto clients = list.size() / static_cast<size_t>(modules);
  std::vector<Piece> pieces;
  int64_t rank = 0;
  for (size_t i = 0; i < list.size(); ++i) {
    if (i % clients == 0) rank = 0;
    const Array array = with_rows(host, list[i]);
    pieces.push_back({array.data, rank, array.stride(0)});
    rank += array.size(rows ? 0 : 1);
  }
  return {factor_type(list[0].scalar),
          rows,
          modules,
          rank,
          list[0].size(rows ? 1 : 0),
          nullptr,
          0,
          0,
          uploaded(host, pieces),
          static_cast<int64_t>(clients)};
}

const double* doubles(const Host& host, const Array& array) {
  if (array.scalar == Scalar::fp64) {
    return static_cast<const double*>(is_contiguous(array) ? array.data
                                                           : contiguous(host, array).data);
  }
  auto* wide = static_cast<double*>(
      host.device->scratch(static_cast<size_t>(elements(array.sizes)) * sizeof(double)));
  widen_floats(strided(array), wide, stream_of(host));
  return wide;
}

Sources sources(const Host& host, const Array& stacked) {
  const Array array = layout_of(stacked, 2).possible ? stacked : contiguous(host, stacked);
  const Layout layout = layout_of(array, 2);
  return {factor_type(array.scalar),
          array.size(0),
          array.size(1),
          layout.rows,
          layout.columns,
          array.data,
          array.stride(0),
          array.stride(1),
          layout.stride,
          nullptr};
}

Sources sources(const Host& host, const Arrays& list, int64_t modules) {
  // One common layout: rows of runs where every tensor has them with the same columns.
  const Layout first = layout_of(list[0], 0);
  bool whole = false;
  for (const Array& array : list) {
    const Layout own = layout_of(array, 0);
    whole |= !own.possible || own.rows != first.rows || own.columns != first.columns;
  }
  std::vector<Source> table;
  Layout layout;
  for (const Array& array : list) {
    const Array view = whole && !is_contiguous(array) ? contiguous(host, array) : array;
    layout = layout_of(view, 0);
    table.push_back({view.data, layout.stride});
  }
  return {factor_type(list[0].scalar),
          modules,
          static_cast<int64_t>(list.size()) / modules,
          layout.rows,
          layout.columns,
          nullptr,
          0,
          0,
          0,
          uploaded(host, table)};
}

}  // namespace fedlora::cuda
