#define FEDLORA_ISA_NAME "avx512"
#define FEDLORA_VECTOR_BYTES 64
#define FEDLORA_TILE_ROWS 8
#define FEDLORA_TILE_VECTORS 2
#include "kernels_body.h"

namespace fedlora {

const Kernels* kernels_avx512() { return &kTable; }

}  // namespace fedlora
