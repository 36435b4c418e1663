#include "memory.h"

#include <cstdlib>
#include <new>

namespace fedlora {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kWaste = 2;  // a kept block serves requests of at least half its size

thread_local Pool* current = nullptr;

}  // namespace

Pool::Pool() : outermost_(current == nullptr) {
  if (outermost_) current = this;
}

Pool::~Pool() {
  if (outermost_) current = nullptr;
  for (const Block& block : free_) std::free(block.data);
}

Pool::Block Pool::take(size_t bytes) {
  if (bytes == 0) return {};
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (current != nullptr) {
    std::vector<Block>& kept = current->free_;
    for (size_t i = kept.size(); i-- > 0;) {
      if (kept[i].bytes < bytes || kept[i].bytes > kWaste * bytes) continue;
      const Block found = kept[i];
      kept[i] = kept.back();
      kept.pop_back();
      return found;
    }
  }
  void* data = std::aligned_alloc(kAlignment, bytes);
  if (data == nullptr) throw std::bad_alloc();
  return {data, bytes};
}

void Pool::give_back(Block block) {
  if (block.data == nullptr) return;
  if (current == nullptr) {
    std::free(block.data);
  } else {
    current->free_.push_back(block);
  }
}

}  // namespace fedlora
