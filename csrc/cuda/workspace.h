// A caller's scratch memory, handed out piece by piece. Without memory it only counts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedlora::cuda {

class Workspace {
 public:
  explicit Workspace(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  void* take_bytes(size_t bytes) {
    char* result = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return result;
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 256;  // what the device's allocators give
  char* memory_;
  size_t used_ = 0;
};

}  // namespace fedlora::cuda
