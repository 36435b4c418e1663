#include "accesses.h"

#include <vector>

namespace fedlora::tests {
namespace {

struct Range {
  uintptr_t first;
  uintptr_t behind;
};

std::vector<Range> ranges;
uint64_t counted = 0;

void access(uintptr_t address, size_t bytes) {
  for (const Range& range : ranges) {
    if (address >= range.first && address < range.behind) counted += bytes;
  }
}

}  // namespace

Accesses::Accesses() { counted = 0; }
Accesses::~Accesses() { ranges.clear(); }

void Accesses::watch(const void* data, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(data);
  ranges.push_back({first, first + bytes});
}

uint64_t Accesses::bytes() const { return counted; }

}  // namespace fedlora::tests

// The names that gcc calls.
#define FEDLORA_ACCESS(name, bytes) \
  void __asan_##name##_noabort(uintptr_t address) { fedlora::tests::access(address, bytes); }

extern "C" {
FEDLORA_ACCESS(load1, 1)
FEDLORA_ACCESS(load2, 2)
FEDLORA_ACCESS(load4, 4)
FEDLORA_ACCESS(load8, 8)
FEDLORA_ACCESS(load16, 16)
FEDLORA_ACCESS(store1, 1)
FEDLORA_ACCESS(store2, 2)
FEDLORA_ACCESS(store4, 4)
FEDLORA_ACCESS(store8, 8)
FEDLORA_ACCESS(store16, 16)
void __asan_loadN_noabort(uintptr_t address, size_t bytes) {
  fedlora::tests::access(address, bytes);
}
void __asan_storeN_noabort(uintptr_t address, size_t bytes) {
  fedlora::tests::access(address, bytes);
}
void __asan_handle_no_return() {}
}
