#include "fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the block emulator switches stacks in x86-64 assembly"
#endif

// fedlora_emulator_switch(void** save, void* load): the stack pointer goes to *save, `load` becomes
// the stack pointer. What a fibre left on its stack is, from the top: rbp rbx r12 r13 r14 r15 and
// the address to return to.
asm(R"(
.text
.type fedlora_emulator_switch, @function
.hidden fedlora_emulator_switch
.globl fedlora_emulator_switch
fedlora_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fedlora_emulator_switch, .-fedlora_emulator_switch
)");
extern "C" void fedlora_emulator_switch(void** save, void* load);

namespace fedlora::emulator {
namespace {

constexpr size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 64 * kPage;  // red zones make frames several times larger
#else
constexpr size_t kStack = 16 * kPage;
#endif

#if defined(__SANITIZE_ADDRESS__)
Fibre* before = nullptr;  // the fibre that the present switch left
#endif

char* new_stack() {
  void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kPage, PROT_NONE);
  return static_cast<char*>(memory) + kPage;
}

}  // namespace

void give_stack(Fibre& fibre, size_t index) {
  static std::vector<char*> made;
  while (made.size() <= index) made.push_back(new_stack());
  fibre.stack = made[index];
  // Tops lie at different offsets within their pages, or all fibres would share one cache set.
  fibre.bytes = kStack - index % 31 * 64;
}

void prepare(Fibre& fibre, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  // A fibre that ended left its frames' red zones behind.
  __asan_unpoison_memory_region(fibre.stack, fibre.bytes);
#endif
  // At a function's first instruction the stack pointer is 8 below a multiple of 16.
  char* top = static_cast<char*>(fibre.stack) + fibre.bytes - 8;
  std::memset(top, 0, 8);
  void* address = reinterpret_cast<void*>(entry);
  std::memcpy(top - 8, &address, 8);
  std::memset(top - 56, 0, 48);
  fibre.stack_pointer = top - 56;
  fibre.fake_stack = nullptr;
}

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (before->stack == nullptr) {  // the thread's own stack, seen for the first time
    before->stack = const_cast<void*>(bottom);
    before->bytes = bytes;
  }
#endif
}

void resume(Fibre& from, Fibre& to) {
#if defined(__SANITIZE_ADDRESS__)
  before = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
#endif
  fedlora_emulator_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace fedlora::emulator
