// The block emulator: kernels written for csrc/cuda/device.cuh, run on the CPU as plain C++.
//
// Every thread of a block, or of a whole cluster, is a fibre. Barriers, shuffles and tensor-core
// instructions are switches: lanes meet at them in an order drawn from a seed, and warps go on in
// such an order, so that a missing barrier changes results. The seed is FEDLORA_EMULATOR_SEED, and
// correct kernels give the same bits for any.
//
// What is stricter than a GPU, on purpose: all 32 lanes of a warp must meet at one and the same
// line, all threads of a block must reach every barrier, also those that would return early, and a
// block has a multiple of 32 threads. Shared memory is a block's own allocation of exactly the
// launch's size (AddressSanitizer sees what lies beyond; without it a guard is checked when the
// block ends), full of NaN at its start. Asynchronous copies happen when they are waited for.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/number.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace fedlora::cuda {

using Stream = int;

struct Device {
  int sm_count;
  size_t shared_per_block;  // bytes a launch may ask for
  int capability;           // 80, 90, 100
};

const Device& device();

// A stream that counts as captured into a graph.
inline constexpr Stream kCaptured = 1;
inline bool is_captured(Stream stream) { return stream == kCaptured; }

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace fedlora::cuda

namespace fedlora::emulator {

inline constexpr cuda::Device kH200 = {132, 232448, 90};
inline constexpr cuda::Device kA100 = {108, 166912, 80};

// The device and the seed that launches see, until this object goes.
class Setting {
 public:
  explicit Setting(const cuda::Device& device, uint64_t seed = 1);
  ~Setting();
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;

 private:
  cuda::Device device_;
  uint64_t seed_;
};

constexpr int kWarp = 32;

// Fused multiply-adds of the kernels so far; a tensor-core instruction has one per product.
inline uint64_t fused = 0;

// Of these, what tensor cores did, by the multiprocessor's scheduler: warp w of a block is on w
// % 4.
inline uint64_t on_scheduler[4] = {};

// Bytes of asynchronous copies so far.
inline uint64_t copied = 0;

// A place in the source where threads meet.
struct Site {
  const char* what;
  const char* file;
  int line;
};

struct Launch {
  dim3 grid;
  int cluster;
  int threads;
  size_t shared_bytes;
};

// Runs `thread` once per thread of the grid. Throws std::runtime_error for what no device would
// launch, and for threads that do not meet.
void run(const Launch& launch, const std::function<void()>& thread);

// Inside a kernel.
void meet_block(const Site& site);
void meet_cluster(const Site& site);

// All lanes meet, each with an argument of its own; the last to come calls `act`, where there is
// one, on all 32 of them. Returns the arguments, which stay until the next but one meeting.
using Act = void (*)(void* const* arguments);
void* const* meet_warp(const Site& site, void* argument, Act act);

// The same for values of at most 8 bytes, which are copied.
const uint64_t* exchange(const Site& site, uint64_t value);

int lane();
unsigned block_in_cluster();
unsigned blocks_in_cluster();
char* shared_of(unsigned block);  // of the present block's cluster

void copy_later(void* to, const void* from, size_t bytes);
void copy_commit();
void copy_wait(size_t newest);

[[noreturn]] void fail(std::string message);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void check_mask(unsigned mask) {
  if (mask != 0xFFFFFFFFU) fail("warp functions take the full mask");
}

}  // namespace fedlora::emulator

// CUDA's own names, which nvcc gives to kernels. They change with every switch.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

#define FEDLORA_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FEDLORA_HERE) {
  fedlora::emulator::meet_block({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFU, FEDLORA_HERE) {
  fedlora::emulator::check_mask(mask);
  fedlora::emulator::meet_warp({"__syncwarp", file, line}, nullptr, nullptr);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FEDLORA_HERE) {
  using namespace fedlora::emulator;
  check_mask(mask);
  const uint64_t* values = exchange({"__shfl_sync", file, line}, to_bits(value));
  return from_bits<T>(values[(lane() & ~(width - 1)) + (source & (width - 1))]);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, FEDLORA_HERE) {
  using namespace fedlora::emulator;
  check_mask(mask);
  const uint64_t* values = exchange({"__shfl_xor_sync", file, line}, to_bits(value));
  const int source = lane() ^ other;
  return from_bits<T>(values[source / width > lane() / width ? lane() : source]);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FEDLORA_HERE) {
  using namespace fedlora::emulator;
  check_mask(mask);
  const uint64_t* values = exchange({"__shfl_down_sync", file, line}, to_bits(value));
  const int source = lane() + static_cast<int>(delta);
  return from_bits<T>(values[source / width == lane() / width ? source : lane()]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FEDLORA_HERE) {
  using namespace fedlora::emulator;
  check_mask(mask);
  const uint64_t* values = exchange({"__shfl_up_sync", file, line}, to_bits(value));
  const int source = lane() - static_cast<int>(delta);
  return from_bits<T>(values[source >= (lane() & ~(width - 1)) ? source : lane()]);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FEDLORA_HERE) {
  using namespace fedlora::emulator;
  check_mask(mask);
  const uint64_t* values = exchange({"__ballot_sync", file, line}, predicate != 0 ? 1 : 0);
  unsigned ballot = 0;
  for (int i = 0; i < kWarp; ++i) ballot |= static_cast<unsigned>(values[i]) << i;
  return ballot;
}

inline int __any_sync(unsigned mask, int predicate, FEDLORA_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0 ? 1 : 0;
}

inline int __all_sync(unsigned mask, int predicate, FEDLORA_HERE) {
  return __ballot_sync(mask, predicate, file, line) == 0xFFFFFFFFU ? 1 : 0;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline double rsqrt(double value) { return 1 / std::sqrt(value); }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }

namespace fedlora::cuda {

using std::ceil, std::copysign, std::exp, std::exp2, std::fabs, std::floor, std::fmax, std::fmin,
    std::hypot, std::isfinite, std::isnan, std::ldexp, std::log2, std::pow, std::sqrt, std::trunc;

template <class T>
T fma(T a, T b, T c) {
  ++emulator::fused;
  return std::fma(a, b, c);
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <class T, class S>
T widen(S value) {
  return static_cast<T>(value);
}
template <class T>
T widen(bf16 value) {
  return wide(BFloat16{value.bits});
}
template <class T>
T widen(fp16 value) {
  return wide(Float16{value.bits});
}

template <class S>
struct Narrowed {
  template <class T>
  static S of(T value) {
    return static_cast<S>(value);
  }
};
template <>
struct Narrowed<bf16> {
  template <class T>
  static bf16 of(T value) {
    return {fedlora::narrow<BFloat16>(value).bits};
  }
};
template <>
struct Narrowed<fp16> {
  template <class T>
  static fp16 of(T value) {
    return {fedlora::narrow<Float16>(value).bits};
  }
};

template <class S, class T>
S narrow(T value) {
  return Narrowed<S>::of(value);
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared_of(emulator::block_in_cluster()));
}

inline unsigned cluster_rank() { return emulator::block_in_cluster(); }
inline unsigned cluster_size() { return emulator::blocks_in_cluster(); }
inline void cluster_sync(FEDLORA_HERE) { emulator::meet_cluster({"cluster_sync", file, line}); }

template <class T>
T* cluster_shared(T* own, unsigned rank) {
  const auto offset = reinterpret_cast<char*>(own) - shared_memory<char>();
  return reinterpret_cast<T*>(emulator::shared_of(rank) + offset);
}

template <int kBytes>
void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % kBytes != 0) {
    emulator::fail("an asynchronous copy that is not aligned");
  }
  emulator::copied += kBytes;
  emulator::copy_later(shared, global, kBytes);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int kNewest>
void copy_wait() {
  emulator::copy_wait(kNewest);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, Stream,
            const A&... arguments) {
  emulator::run({grid, 1, threads, shared_bytes}, [&] { kernel(static_cast<P>(arguments)...); });
}

template <class... P, class... A>
void launch_cluster(void (*kernel)(P...), dim3 grid, int cluster, int threads, size_t shared_bytes,
                    Stream, const A&... arguments) {
  emulator::run({grid, cluster, threads, shared_bytes},
                [&] { kernel(static_cast<P>(arguments)...); });
}

}  // namespace fedlora::cuda

#undef FEDLORA_HERE
