#define FEDLORA_ISA_NAME "avx2"
#define FEDLORA_VECTOR_BYTES 32
#define FEDLORA_TILE_ROWS 4
#define FEDLORA_TILE_VECTORS 2
#include "kernels_body.h"

namespace fedlora {

const Kernels* kernels_avx2() { return &kTable; }

}  // namespace fedlora
