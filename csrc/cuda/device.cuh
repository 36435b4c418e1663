// The dialect of CUDA C++ in which the kernels are written: everything in which nvcc and the block
// emulator (csrc/tests/emulator) differ, behind one set of names.
//
// Beside CUDA's own names (threadIdx, __syncthreads, __shfl_sync, ...; full masks only):
//   shared_memory<T>()                    the block's dynamic shared memory, 128-byte aligned
//   cluster_rank/size/sync/shared         distributed shared memory, sm_90 and later
//   copy_async<Bytes>, copy_commit/wait   cp.async from global into shared memory
//   widen<T>, narrow<S>                   adapters' number types to float or double and back
//   launch, launch_cluster, device,       on the host; launch throws std::runtime_error
//   is_captured
#pragma once

// Code that only calls the stages, and is compiled by the host's compiler for the CUDA library
// (FEDLORA_CUDA), sees Stream and Device.
#if !defined(__CUDACC__) && !defined(FEDLORA_CUDA)
#include "tests/emulator/emulator.h"
#else

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace fedlora::cuda {

using Stream = cudaStream_t;

struct Device {
  int sm_count;
  size_t shared_per_block;  // bytes a launch may ask for
  int capability;           // 80, 90, 100
};

// The current device.
const Device& device();

// Whether what is launched there becomes part of a CUDA graph.
bool is_captured(Stream stream);

void check(cudaError_t error, const void* kernel = nullptr);

// What a kernel needs before it may be launched with this much dynamic shared memory.
void reserve_shared(const void* kernel, size_t bytes);

#ifdef __CUDACC__

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T, class S>
__device__ __forceinline__ T widen(S value) {
  if constexpr (std::is_same_v<S, bf16>) {
    return __bfloat162float(value);
  } else if constexpr (std::is_same_v<S, fp16>) {
    return __half2float(value);
  } else {
    return static_cast<T>(value);
  }
}

template <class S, class T>
__device__ __forceinline__ S narrow(T value) {
  if constexpr (std::is_same_v<S, bf16>) {
    if constexpr (std::is_same_v<T, double>) {
      return __double2bfloat16(value);
    } else {
      return __float2bfloat16(value);
    }
  } else if constexpr (std::is_same_v<S, fp16>) {
    if constexpr (std::is_same_v<T, double>) {
      return __double2half(value);
    } else {
      return __float2half(value);
    }
  } else {
    return static_cast<S>(value);
  }
}

template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) char fedlora_shared_memory[];
  return reinterpret_cast<T*>(fedlora_shared_memory);
}

// Before sm_90 there are no clusters and launch_cluster refuses; what stands here is never run.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <class T>
__device__ __forceinline__ T* cluster_shared(T* own, unsigned rank) {
  T* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(own), "r"(rank));
  return other;
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* cluster_shared(T* own, unsigned) {
  return own;
}
#endif

template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {  // past L1: tiles are read once per block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes)
                 : "memory");
  }
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kNewest>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

template <class... P, class... A>
void launch_cluster(void (*kernel)(P...), dim3 grid, int cluster, int threads, size_t shared_bytes,
                    Stream stream, const A&... arguments) {
  reserve_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...),
        reinterpret_cast<const void*>(kernel));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, Stream stream,
            const A&... arguments) {
  launch_cluster(kernel, grid, 1, threads, shared_bytes, stream, arguments...);
}

#endif

}  // namespace fedlora::cuda

#endif
