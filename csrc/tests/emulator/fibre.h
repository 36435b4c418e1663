// Fibres: many stacks on one thread, and the switch between them.
//
// A switch saves the six registers that the x86-64 calling convention asks to keep and changes the
// stack pointer: no system call, a few nanoseconds. Only for code that leaves the floating-point
// control words alone.
#pragma once

#include <cstddef>

namespace fedlora::emulator {

struct Fibre {
  void* stack_pointer = nullptr;
  void* stack = nullptr;  // lowest usable address; of the thread's own stack where null
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's, while the fibre is away
};

// Makes `fibre` begin with `entry` when it is next resumed. `entry` must not return.
void prepare(Fibre& fibre, void (*entry)());

// Leaves `from` and continues `to` where it left off.
void resume(Fibre& from, Fibre& to);

// Entry functions call this first; it tells AddressSanitizer that the switch is done.
void arrived();

// Gives a fibre the stack number `index`: made once and used again, a guard page below it.
void give_stack(Fibre& fibre, size_t index);

}  // namespace fedlora::emulator
