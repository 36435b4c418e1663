#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>

#include "core/kernels.h"

int main(int argc, char** argv) {
  const char* wanted = std::getenv("FEDLORA_ISA");
  if (wanted != nullptr && fedlora::kernels(wanted) == nullptr) {
    std::printf("this machine has no %s\n", wanted);
    return 77;
  }
  return doctest::Context(argc, argv).run();
}
