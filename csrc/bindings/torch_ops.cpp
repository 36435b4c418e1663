// The kernels of torch.ops.fedlora, on LibTorch's stable ABI: one build for every Python and every
// torch from 2.10 on. Schemas and fakes are declared by fedlora_kernels/ops; this only registers
// implementations, with the same checks and sentences.
//
// Compiled three times: libfedlora_cpu registers the core for key CPU; libfedlora_cuda
// (FEDLORA_CUDA) the kernels of csrc/cuda for key CUDA; libfedlora_cuda_emulated (FEDLORA_EMULATED)
// the same kernels in the block emulator, for key CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "operators.h"

#if defined(FEDLORA_CUDA) || defined(FEDLORA_EMULATED)
#include "torch_device.h"
#endif
#ifdef FEDLORA_CUDA
#define FEDLORA_KEY CUDA
#else
#define FEDLORA_KEY CPU
#endif

namespace fedlora {
namespace {

using torch::stable::Tensor;
using TorchType = torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;

Scalar scalar_of(TorchType type) {
  switch (type) {
    case TorchType::BFloat16:
      return Scalar::bf16;
    case TorchType::Half:
      return Scalar::fp16;
    case TorchType::Float:
      return Scalar::fp32;
    case TorchType::Double:
      return Scalar::fp64;
    case TorchType::Long:
      return Scalar::int64;
    default:
      return Scalar::other;
  }
}

TorchType type_of(Scalar scalar) {
  switch (scalar) {
    case Scalar::bf16:
      return TorchType::BFloat16;
    case Scalar::fp16:
      return TorchType::Half;
    case Scalar::fp32:
      return TorchType::Float;
    case Scalar::int64:
      return TorchType::Long;
    default:
      return TorchType::Double;
  }
}

// torch's Python name of a type, for messages.
std::string name_of(TorchType type) {
  switch (type) {
    case TorchType::BFloat16:
      return "torch.bfloat16";
    case TorchType::Half:
      return "torch.float16";
    case TorchType::Float:
      return "torch.float32";
    case TorchType::Double:
      return "torch.float64";
    case TorchType::Long:
      return "torch.int64";
    case TorchType::Int:
      return "torch.int32";
    case TorchType::Short:
      return "torch.int16";
    case TorchType::Char:
      return "torch.int8";
    case TorchType::Byte:
      return "torch.uint8";
    case TorchType::Bool:
      return "torch.bool";
    case TorchType::ComplexFloat:
      return "torch.complex64";
    case TorchType::ComplexDouble:
      return "torch.complex128";
    default:
      return std::string("torch.") + torch::headeronly::toString(type);
  }
}

Array array_of(const Tensor& tensor) {
  const TorchType type = tensor.scalar_type();
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  // Read only where it is an argument; const_data_ptr leaves copy-on-write tensors shared.
  return {const_cast<void*>(tensor.const_data_ptr()), scalar_of(type), name_of(type),
          Sizes(sizes.begin(), sizes.end()), Sizes(strides.begin(), strides.end())};
}

Arrays arrays_of(const Tensors& tensors) {
  Arrays arrays;
  for (const Tensor& tensor : tensors) arrays.push_back(array_of(tensor));
  return arrays;
}

// The one device that an operator's tensors are on.
class Place {
 public:
  template <class... T>
  explicit Place(const T&... arguments) {
    (add(arguments), ...);
  }
  const torch::stable::Device& device() const { return *device_; }

 private:
  void add(const Tensor& tensor) {
    if (!device_) device_ = tensor.device();
    if (tensor.device() != *device_) {
      throw std::runtime_error("all tensors must be on one device, found " + text(*device_) +
                               " and " + text(tensor.device()));
    }
  }
  void add(const Tensors& tensors) {
    for (const Tensor& tensor : tensors) add(tensor);
  }
  template <class T>
  void add(const T&) {}

  static std::string text(const torch::stable::Device& device) {
    return device.is_cpu() ? "cpu" : "cuda:" + std::to_string(device.index());
  }

  std::optional<torch::stable::Device> device_;
};

// What torch hands over for an argument of an operator, and what the operator gets of it.
template <class T>
struct Argument {
  using Handed = T;
};
template <>
struct Argument<Array> {
  using Handed = const Tensor&;
};
template <>
struct Argument<Arrays> {
  using Handed = const Tensors&;
};
template <>
struct Argument<std::string> {
  using Handed = std::string_view;
};

auto taken(const Tensor& tensor) { return array_of(tensor); }
auto taken(const Tensors& tensors) { return arrays_of(tensors); }
auto taken(std::string_view text) { return std::string(text); }
template <class T>
auto taken(const T& value) {
  return value;
}

// The first N results: one alone, several as a tuple.
template <size_t N>
auto returned(const Tensors& results) {
  if constexpr (N == 1) {
    return results[0];
  } else {
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return std::tuple(results[I]...);
    }(std::make_index_sequence<N>());
  }
}

template <size_t N>
struct Name {
  constexpr Name(const char (&literal)[N]) { std::copy_n(literal, N, text); }
  char text[N];
};

// An operator as torch calls it, its signature deduced; N is how many results its schema has.
// Mistakes become RuntimeErrors that name the operator.
template <Name name, auto run, size_t N, class = decltype(run)>
struct Kernel;

template <Name name, auto run, size_t N, class... T>
struct Kernel<name, run, N, void (*)(const Host&, T...)> {
  static auto call(typename Argument<std::decay_t<T>>::Handed... arguments) {
    Tensors results;
    try {
      const Place place(arguments...);
      Host host = {[&](Scalar scalar, const Sizes& sizes) {
                     results.push_back(torch::stable::empty(sizes, type_of(scalar), std::nullopt,
                                                            place.device()));
                     Array array = array_of(results.back());
                     array.data = results.back().mutable_data_ptr();
                     return array;
                   },
                   static_cast<int>(torch::stable::get_num_threads())};
#if defined(FEDLORA_CUDA) || defined(FEDLORA_EMULATED)
      const TorchDevice device(place.device());
      host.device = device.memory();
#endif
      run(host, taken(arguments)...);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string("fedlora::") + name.text + ": " + error.what());
    }
    return returned<N>(results);
  }
};

}  // namespace
}  // namespace fedlora

// A row: the operator's name and how many results it has.
#define FEDLORA_OPERATOR(name, results) \
  m.impl(#name, TORCH_BOX((&fedlora::Kernel<#name, fedlora::operators::name, results>::call)))

STABLE_TORCH_LIBRARY_IMPL(fedlora, FEDLORA_KEY, m) {
  FEDLORA_OPERATOR(gram, 1);
  FEDLORA_OPERATOR(gram_list, 1);
  FEDLORA_OPERATOR(spectrum, 5);
  FEDLORA_OPERATOR(select_rank, 1);
  FEDLORA_OPERATOR(surrogate, 3);
  FEDLORA_OPERATOR(combine, 2);
  FEDLORA_OPERATOR(combine_list, 2);
  FEDLORA_OPERATOR(weighted_sum, 1);
  FEDLORA_OPERATOR(weighted_sum_list, 1);
  FEDLORA_OPERATOR(stacked_svd, 4);
  FEDLORA_OPERATOR(stacked_svd_list, 4);
  FEDLORA_OPERATOR(flora_na, 5);
  FEDLORA_OPERATOR(flora_na_list, 5);
}
