// Aligned scratch memory that is not set to zero: every stage writes before it reads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fedlora {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : data_(allocate(count)) {}

  T* get() const { return data_.get(); }
  T& operator[](int64_t index) const { return data_.get()[index]; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };

  // 64 bytes: one AVX-512 vector, one cache line.
  static T* allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    void* data = std::aligned_alloc(64, bytes == 0 ? 64 : bytes);
    if (data == nullptr) throw std::bad_alloc();
    return static_cast<T*>(data);
  }

  std::unique_ptr<T, Free> data_;
};

}  // namespace fedlora
