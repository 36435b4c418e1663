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
#include <array>
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

// What an element type is called here and in messages. `code` is libtorch's own number for it,
// which only a call through its shim tells; a list asks hundreds of times, so they are asked once.
struct Type {
  int32_t code;
  Scalar scalar;
  const char* name;  // torch's Python name
};

const Type& described(int32_t code) {
  static const std::array known = {
      Type{aoti_torch_dtype_float32(), Scalar::fp32, "torch.float32"},
      Type{aoti_torch_dtype_bfloat16(), Scalar::bf16, "torch.bfloat16"},
      Type{aoti_torch_dtype_float16(), Scalar::fp16, "torch.float16"},
      Type{aoti_torch_dtype_float64(), Scalar::fp64, "torch.float64"},
      Type{aoti_torch_dtype_int64(), Scalar::int64, "torch.int64"},
      Type{aoti_torch_dtype_int32(), Scalar::other, "torch.int32"},
      Type{aoti_torch_dtype_int16(), Scalar::other, "torch.int16"},
      Type{aoti_torch_dtype_int8(), Scalar::other, "torch.int8"},
      Type{aoti_torch_dtype_uint8(), Scalar::other, "torch.uint8"},
      Type{aoti_torch_dtype_bool(), Scalar::other, "torch.bool"},
      Type{aoti_torch_dtype_uint16(), Scalar::other, "torch.uint16"},
      Type{aoti_torch_dtype_uint32(), Scalar::other, "torch.uint32"},
      Type{aoti_torch_dtype_uint64(), Scalar::other, "torch.uint64"},
      Type{aoti_torch_dtype_complex32(), Scalar::other, "torch.complex32"},
      Type{aoti_torch_dtype_complex64(), Scalar::other, "torch.complex64"},
      Type{aoti_torch_dtype_complex128(), Scalar::other, "torch.complex128"},
      Type{aoti_torch_dtype_float8_e4m3fn(), Scalar::other, "torch.float8_e4m3fn"},
      Type{aoti_torch_dtype_float8_e4m3fnuz(), Scalar::other, "torch.float8_e4m3fnuz"},
      Type{aoti_torch_dtype_float8_e5m2fnuz(), Scalar::other, "torch.float8_e5m2fnuz"},
      Type{aoti_torch_dtype_float8_e5m2(), Scalar::other, "torch.float8_e5m2"},
  };
  static const Type unknown = {-1, Scalar::other, "another type"};
  for (const Type& type : known) {
    if (type.code == code) return type;
  }
  return unknown;
}

Array array_of(const Tensor& tensor) {
  AtenTensorHandle handle = tensor.get();
  int32_t code = 0;
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &code));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  const Type& type = described(code);
  // Read only where it is an argument; const_data_ptr leaves copy-on-write tensors shared.
  return {const_cast<void*>(tensor.const_data_ptr()), type.scalar, type.name,
          Sizes(sizes, sizes + dim), Sizes(strides, strides + dim)};
}

Arrays arrays_of(const Tensors& tensors) {
  Arrays arrays;
  arrays.reserve(tensors.size());
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
  torch::stable::Device device() const { return first_->device(); }

 private:
  void add(const Tensor& tensor) {
    int32_t type = 0;
    int32_t index = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
    if (first_ == nullptr) {
      first_ = &tensor;
      type_ = type;
      index_ = index;
    }
    if (type != type_ || index != index_) {
      throw std::runtime_error("all tensors must be on one device, found " +
                               text(first_->device()) + " and " + text(tensor.device()));
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

  const Tensor* first_ = nullptr;
  int32_t type_ = 0;
  int32_t index_ = 0;
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
struct Argument<std::vector<int64_t>> {
  using Handed = const std::vector<int64_t>&;
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
      Host host = {
          [&](Scalar scalar, const Sizes& sizes) {
            results.push_back(torch::stable::empty({sizes.data(), sizes.size()}, type_of(scalar),
                                                   std::nullopt, place.device()));
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
  FEDLORA_OPERATOR(client_products, 1);
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
