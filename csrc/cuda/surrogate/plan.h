// Where one block of surrogate keeps its arrays: in shared memory while there is some, those it
// uses most first, then in global memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.cuh"

namespace fedlora::cuda {

// A sweep is some 60 barriers at K = 10, which take longer the more warps they wait for.
constexpr int kDescentThreads = 256;

// Where an array of a block lies: so many numbers into its shared or its global memory.
struct DescentPlace {
  int64_t offset;
  bool shared;

  template <class T>
  __device__ T* in(double* shared_base, double* global_base) const {
    return reinterpret_cast<T*>((shared ? shared_base : global_base) + offset);
  }
};

// A block's memory. Arrays that are used most are placed first.
struct DescentPlan {
  DescentPlace weights;    // p and q of three points, 6 [K]; 6 [K] of the solver, the last of ints
  DescentPlace partial;    // [max(threads, K rounded up to 32)]
  DescentPlace pairs;      // [pairs]
  DescentPlace quadratic;  // 6 [entries]
  DescentPlace factor;     // [K, K]
  DescentPlace packed_a;   // [pairs, entries]
  DescentPlace packed_b;
  DescentPlace second;  // [K, K]
  int64_t shared_size = 0;
  int64_t global_size = 0;

  DescentPlan(int64_t clients, int64_t rank) {
    const int64_t pairs_count = clients * (clients + 1) / 2;
    const int64_t entries = rank * (rank + 1) / 2;
    const auto limit = static_cast<int64_t>(device().shared_per_block / sizeof(double));
    const auto take = [&](int64_t count) {
      count = (count + 15) / 16 * 16;
      int64_t& used = shared_size + count <= limit ? shared_size : global_size;
      const DescentPlace place = {used, &used == &shared_size};
      used += count;
      return place;
    };
    weights = take(12 * clients);
    partial = take(std::max<int64_t>(kDescentThreads, clients + 32));
    pairs = take(pairs_count);
    quadratic = take(6 * entries);
    factor = take(clients * clients);
    // Grams that do not fit stay where they were packed.
    packed_a = keep(pairs_count * entries, limit);
    packed_b = keep(pairs_count * entries, limit);
    second = take(clients * clients);
  }

 private:
  DescentPlace keep(int64_t count, int64_t limit) {
    const bool fits = shared_size + count <= limit;
    const DescentPlace place = {shared_size, fits};
    if (fits) shared_size += count;
    return place;
  }
};

}  // namespace fedlora::cuda
