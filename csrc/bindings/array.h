// What torch tensors and numpy arrays have in common, and the mistakes a caller can make with them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/factors.h"

namespace fedlora {

enum class Scalar { bf16, fp16, fp32, fp64, int64, other };

// Up to four numbers, as factors and results have them, without memory of its own: lists hold
// hundreds of tensors.
class Sizes {
 public:
  Sizes() = default;
  Sizes(std::initializer_list<int64_t> values) : Sizes(values.begin(), values.end()) {}
  Sizes(size_t count, int64_t value) {
    for (size_t i = 0; i < count; ++i) push_back(value);
  }
  template <class Iterator>
    requires(!std::is_integral_v<Iterator>)
  Sizes(Iterator first, Iterator last) {
    for (; first != last; ++first) push_back(*first);
  }

  void push_back(int64_t value) {
    if (size_ == few_.size()) many_.assign(few_.begin(), few_.end());
    if (size_ < few_.size()) {
      few_[size_] = value;
    } else {
      many_.push_back(value);
    }
    ++size_;
  }

  size_t size() const { return size_; }
  const int64_t* data() const { return size_ <= few_.size() ? few_.data() : many_.data(); }
  int64_t* data() { return size_ <= few_.size() ? few_.data() : many_.data(); }
  const int64_t* begin() const { return data(); }
  const int64_t* end() const { return data() + size_; }
  int64_t operator[](size_t axis) const { return data()[axis]; }
  int64_t& operator[](size_t axis) { return data()[axis]; }
  int64_t back() const { return data()[size_ - 1]; }
  bool operator==(const Sizes& other) const {
    return std::equal(begin(), end(), other.begin(), other.end());
  }

 private:
  size_t size_ = 0;
  std::array<int64_t, 4> few_ = {};
  std::vector<int64_t> many_;  // all of them, where they are more
};

struct Array {
  void* data;
  Scalar scalar;
  const char* dtype;  // as messages show it
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
// uninitialized arrays; results are handed back in the order in which they were asked for.
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
