#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fedlora {

#ifdef FEDLORA_X86
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
#endif
const Kernels* kernels_portable();

namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("FEDLORA_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    if (const Kernels* found = kernels(wanted)) return *found;
    throw std::runtime_error("FEDLORA_ISA=" + std::string(wanted) +
                             " is not among the instruction sets of this build and machine");
  }
  for (const char* name : {"avx512", "avx2"}) {
    if (const Kernels* found = kernels(name)) return *found;
  }
  return *kernels_portable();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels* kernels(const char* name) {
  const std::string_view wanted(name);
#ifdef FEDLORA_X86
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma") != 0;
  if (wanted == "avx512" && fma && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return kernels_avx512();
  }
  if (wanted == "avx2" && fma && __builtin_cpu_supports("avx2")) return kernels_avx2();
#endif
  return wanted == "portable" ? kernels_portable() : nullptr;
}

}  // namespace fedlora
