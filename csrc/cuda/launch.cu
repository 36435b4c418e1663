// The host's side of device.cuh under nvcc; the emulator brings its own.
#include "device.cuh"

#ifdef __CUDACC__

#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

namespace fedlora::cuda {
namespace {

constexpr size_t kWithoutAsking = 48 * 1024;  // bytes

std::string name_of(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || mangled == nullptr) return "a kernel";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> plain(
      abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
  return status == 0 ? plain.get() : mangled;
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index));
  return value;
}

Device described(int index) {
  return {attribute(cudaDevAttrMultiProcessorCount, index),
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)),
          10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
              attribute(cudaDevAttrComputeCapabilityMinor, index)};
}

}  // namespace

void check(cudaError_t error, const void* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky must not surface in a later call
  std::string message = kernel == nullptr ? "CUDA" : name_of(kernel);
  message += std::string(": ") + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message += "; the CUDA kernels need sm_80 or later, FEDLORA_BACKEND=composed serves the others";
  }
  throw std::runtime_error(message);
}

// More than 48 KB have to be asked for, per kernel and device. Always all there is: what is asked
// for stays, and less of it would refuse the launch that another thread is about to make.
void reserve_shared(const void* kernel, size_t bytes) {
  if (bytes <= kWithoutAsking) return;
  const size_t most = device().shared_per_block;
  if (bytes > most) {
    throw std::runtime_error(name_of(kernel) + ": " + std::to_string(bytes) +
                             " bytes of shared memory, the device has " + std::to_string(most));
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most)),
        kernel);
}

bool is_captured(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

const Device& device() {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  int index = 0;
  check(cudaGetDevice(&index));
  const std::lock_guard lock(mutex);
  const auto found = devices.find(index);
  return found != devices.end() ? found->second
                                : devices.emplace(index, described(index)).first->second;
}

}  // namespace fedlora::cuda

#endif
