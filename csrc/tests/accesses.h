// Bytes that kernels read and write, for tests of what a stage moves.
//
// The kernels of cost_tests are compiled with gcc's calls around every access to memory, as for the
// kernel's address sanitizer; accesses.cpp answers them. Counted is what lies in a range that a
// test names, so neither the threads' own variables nor the emulator's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedlora::tests {

// Counts the accesses to device memory while it lives; one at a time.
class Accesses {
 public:
  Accesses();
  ~Accesses();
  Accesses(const Accesses&) = delete;
  Accesses& operator=(const Accesses&) = delete;

  void watch(const void* data, size_t bytes);
  uint64_t bytes() const;
};

}  // namespace fedlora::tests
