// A device's memory and stream, from torch: for the CUDA kernels, and for the block emulator, whose
// device is the host.
//
// Scratch memory comes from torch's allocator on the current stream, so that it may be given back
// while kernels still use it. Tables are copied from pinned memory, which torch keeps until the
// copy is done; a CUDA graph would read it again later, so a capturing stream is refused.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "array.h"

#ifdef FEDLORA_CUDA
#include <dlfcn.h>

#include "cuda/device.cuh"
#endif

namespace fedlora {

class TorchDevice {
 public:
  using Tensor = torch::stable::Tensor;
  using Device = torch::stable::Device;

  explicit TorchDevice(const Device& device)
      : device_(device),
#ifdef FEDLORA_CUDA
        guard_(device.index()),
#endif
        memory_{[this](size_t bytes) { return scratch(bytes); },
                [this](const void* from, size_t bytes) { return uploaded(from, bytes); },
                stream(device)} {
  }
  TorchDevice(const TorchDevice&) = delete;
  TorchDevice& operator=(const TorchDevice&) = delete;

  const DeviceMemory* memory() const { return &memory_; }

 private:
  static constexpr auto kByte = torch::headeronly::ScalarType::Byte;

  Tensor bytes_on(size_t bytes, const Device& device, bool pinned) {
    return torch::stable::empty({static_cast<int64_t>(bytes)}, kByte, std::nullopt, device, pinned);
  }

  void* scratch(size_t bytes) {
    kept_.push_back(bytes_on(bytes, device_, false));
    return kept_.back().mutable_data_ptr();
  }

  const void* uploaded(const void* from, size_t bytes) {
#ifdef FEDLORA_CUDA
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cuda::check(cudaStreamIsCapturing(static_cast<cudaStream_t>(memory_.stream), &status));
    if (status != cudaStreamCaptureStatusNone) {
      throw std::runtime_error(
          "a list of tensors cannot be captured in a CUDA graph; pass one stacked tensor");
    }
    Tensor pinned = bytes_on(bytes, Device(torch::headeronly::DeviceType::CPU), true);
    std::memcpy(pinned.mutable_data_ptr(), from, bytes);
    kept_.push_back(bytes_on(bytes, device_, false));
    torch::stable::copy_(kept_.back(), pinned, true);
    return kept_.back().const_data_ptr();
#else
    void* to = scratch(bytes);
    std::memcpy(to, from, bytes);
    return to;
#endif
  }

  // Looked up in the library that torch has loaded, so that building needs no torch with CUDA.
  static void* stream(const Device& device) {
#ifdef FEDLORA_CUDA
    using Get = AOTITorchError (*)(int32_t, void**);
    static const auto get = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return library == nullptr
                 ? nullptr
                 : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    void* stream = nullptr;
    if (get == nullptr || get(device.index(), &stream) != 0) {
      throw std::runtime_error("torch gives no CUDA stream");
    }
    return stream;
#else
    (void)device;
    return nullptr;
#endif
  }

  Device device_;
#ifdef FEDLORA_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  std::vector<Tensor> kept_;
  DeviceMemory memory_;
};

}  // namespace fedlora
