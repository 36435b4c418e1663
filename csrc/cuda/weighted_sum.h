// weighted_sum: out = sum_k w_k source_k for every module, one pass at memory bandwidth.
#pragma once

#include <cstdint>

#include "core/factors.h"
#include "device.cuh"

namespace fedlora::cuda {

struct Source {
  const void* data;
  int64_t stride;  // elements from run to run
};

// For each of the modules `clients` sources of `rows` runs of `columns` contiguous elements.
struct Sources {
  DType dtype;
  int64_t modules;
  int64_t clients;
  int64_t rows;
  int64_t columns;

  const void* data;  // of a stack
  int64_t module_stride;
  int64_t client_stride;
  int64_t stride;

  const Source* table;  // of a list, [modules, clients] in device memory; null for a stack
};

// Module l, client k: first[l * module + k * client] times second[...], where there is a second.
struct Weights {
  const double* first;
  int64_t module_stride;
  const double* second = nullptr;
};

// out: [modules, rows, columns] contiguous.
void weighted_sum(const Sources& sources, const Weights& weights, void* out, Stream stream);

}  // namespace fedlora::cuda
