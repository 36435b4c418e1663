// The clients' factors as they lie in device memory, the input of every stage that reads adapters.
//
//   rows = true    the A side: line i is row i of A, its `depth` numbers lie together
//   rows = false   the B side: line i is column i of B, the numbers of one depth lie together
//
// A stack is one tensor for all modules and needs no table. A list of clients' tensors is a table
// of pieces in device memory, module by module, in the order of their first lines.
#pragma once

#include <cstdint>

#include "core/factors.h"
#include "device.cuh"

namespace fedlora::cuda {

struct Piece {
  const void* data;
  int64_t start;   // its first line
  int64_t stride;  // elements from row to row
};

struct Factors {
  DType dtype;
  bool rows;
  int64_t modules;  // L
  int64_t rank;     // R
  int64_t depth;    // m or n

  const void* data;  // of a stack
  int64_t module_stride;
  int64_t stride;

  const Piece* pieces;  // of a list, [L, count]; null for a stack
  int64_t count;
};

}  // namespace fedlora::cuda
