// What torch tensors and numpy arrays have in common, and the mistakes a caller can make with them.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/factors.h"

namespace fedlora {

enum class Scalar { bf16, fp16, fp32, fp64, int64, other };

using Sizes = std::vector<int64_t>;

struct Array {
  void* data;
  Scalar scalar;
  std::string dtype;  // as messages show it
  Sizes sizes;
  Sizes strides;  // in elements

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }
  int64_t size(int64_t axis) const { return sizes[static_cast<size_t>(axis)]; }
  int64_t stride(int64_t axis) const { return strides[static_cast<size_t>(axis)]; }
};

using Arrays = std::vector<Array>;

// Memory and order on a device.
struct DeviceMemory {
  std::function<void*(size_t)> scratch;                      // until the operator returns
  std::function<const void*(const void*, size_t)> uploaded;  // a copy of the host's bytes
  void* stream;
};

// Where an operator puts its results and how many threads it may use. allocate() gives contiguous,
// uninitialised arrays; results are handed back in the order in which they were asked for.
struct Host {
  std::function<Array(Scalar, const Sizes&)> allocate;
  int threads;
  const DeviceMemory* device = nullptr;  // of arrays that are not the CPU's
};

// ValueError and TypeError of the Python faces; RuntimeError of the raw torch operators.
struct WrongValue : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct WrongType : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace fedlora
