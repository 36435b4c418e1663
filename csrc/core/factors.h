// The clients' factors as they lie in memory, the input of every stage that reads adapters.
//
//   rows = true    the A side: part k is A_k [rank, depth], one row every `stride` elements
//   rows = false   the B side: part k is B_k [depth, rank], likewise
//
// The innermost dimension is always contiguous. A stacked tensor is one part; a list of clients'
// tensors is one part per client, and nothing is copied to bring them together. Plain pointers,
// because the kernels that read this are compiled once per instruction set and must not instantiate
// library templates with instructions that another machine lacks.
#pragma once

#include <cstdint>

namespace fedlora {

enum class DType { bf16, fp16, fp32, fp64 };

constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::fp64 ? 8 : dtype == DType::fp32 ? 4 : 2;
}

struct Part {
  const void* data;
  int64_t rank;
  int64_t stride;
};

struct Factors {
  DType dtype;
  bool rows;
  int64_t rank;   // R, the sum of the parts' ranks
  int64_t depth;  // m or n
  const Part* parts;
  int64_t count;

  const void* at(const Part& part, int64_t row, int64_t column) const {
    return static_cast<const char*>(part.data) + (row * part.stride + column) * bytes_of(dtype);
  }
};

}  // namespace fedlora
