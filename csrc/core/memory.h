// Aligned scratch memory that is not set to zero: every stage writes before it reads.
//
// A thread that runs modules one after the other keeps its blocks in a Pool between them. Without
// it the allocator gives every block over 128 KiB back to the system and each module faults all its
// pages in again: 16 modules at R = 128 on two threads took 2.5 ms each, 1.6 of them outside the
// Gram pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace fedlora {

// Keeps the blocks that Buffers of this thread give back, until it ends. Inside another Pool of the
// same thread it does nothing.
class Pool {
 public:
  Pool();
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  // At least so many bytes, 64-byte aligned: one AVX-512 vector, one cache line.
  static Block take(size_t bytes);
  static void give_back(Block block);

 private:
  bool outermost_;
  std::vector<Block> free_;
};

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : block_(Pool::take(static_cast<size_t>(count) * sizeof(T))) {}
  ~Buffer() { Pool::give_back(block_); }
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, {})) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }

  T* get() const { return static_cast<T*>(block_.data); }
  T& operator[](int64_t index) const { return get()[index]; }

 private:
  Pool::Block block_;
};

}  // namespace fedlora
