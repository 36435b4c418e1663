#define FEDLORA_ISA_NAME "portable"
#define FEDLORA_VECTOR_BYTES 16
#define FEDLORA_TILE_ROWS 2
#define FEDLORA_TILE_VECTORS 4
#include "kernels_body.h"

namespace fedlora {

const Kernels* kernels_portable() { return &kTable; }

}  // namespace fedlora
