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

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
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
using MaxRank = std::optional<int64_t>;

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

auto converted(const Tensor& tensor) { return array_of(tensor); }
auto converted(const Tensors& tensors) { return arrays_of(tensors); }
auto converted(std::string_view text) { return std::string(text); }
template <class T>
auto converted(const T& value) {
  return value;
}

// Runs an operator on its arguments and returns its N results. Mistakes become RuntimeErrors that
// name it.
template <size_t N, class F, class... T>
auto results_of(const char* name, F run, const T&... arguments) {
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
    run(host, converted(arguments)...);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("fedlora::") + name + ": " + error.what());
  }
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return std::tuple(results[I]...);
  }(std::make_index_sequence<N>());
}

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor gram(const Tensor& x, bool rows, std::string_view precision) {
  return std::get<0>(results_of<1>("gram", operators::gram, x, rows, precision));
}

Tensor gram_list(const Tensors& x, int64_t modules, bool rows, std::string_view precision) {
  return std::get<0>(results_of<1>("gram_list", operators::gram_list, x, modules, rows, precision));
}

Five spectrum(const Tensor& gram_b, const Tensor& gram_a, const Tensor& scale, double energy,
              MaxRank max_rank) {
  return results_of<5>("spectrum", operators::spectrum, gram_b, gram_a, scale, energy, max_rank);
}

Tensor select_rank(const Tensor& sigma, const Tensor& total_energy, double energy,
                   MaxRank max_rank) {
  return std::get<0>(
      results_of<1>("select_rank", operators::select_rank, sigma, total_energy, energy, max_rank));
}

Three surrogate(const Tensor& gram_b, const Tensor& gram_a, const Tensor& weights,
                const Tensor& scale, int64_t max_sweeps, double tol) {
  return results_of<3>("surrogate", operators::surrogate, gram_b, gram_a, weights, scale,
                       max_sweeps, tol);
}

Two combine(const Tensor& b, const Tensor& a, const Tensor& x, const Tensor& y) {
  return results_of<2>("combine", operators::combine, b, a, x, y);
}

Two combine_list(const Tensors& b, const Tensors& a, const Tensor& x, const Tensor& y) {
  return results_of<2>("combine_list", operators::combine_list, b, a, x, y);
}

Tensor weighted_sum(const Tensor& stacked, const Tensor& weights) {
  return std::get<0>(results_of<1>("weighted_sum", operators::weighted_sum, stacked, weights));
}

Tensor weighted_sum_list(const Tensors& factors, const Tensor& weights) {
  return std::get<0>(
      results_of<1>("weighted_sum_list", operators::weighted_sum_list, factors, weights));
}

Four stacked_svd(const Tensor& b, const Tensor& a, const Tensor& scale, double energy,
                 MaxRank max_rank, std::string_view precision) {
  return results_of<4>("stacked_svd", operators::stacked_svd, b, a, scale, energy, max_rank,
                       precision);
}

Four stacked_svd_list(const Tensors& b, const Tensors& a, const Tensor& scale, double energy,
                      MaxRank max_rank, std::string_view precision) {
  return results_of<4>("stacked_svd_list", operators::stacked_svd_list, b, a, scale, energy,
                       max_rank, precision);
}

Five flora_na(const Tensor& b, const Tensor& a, const Tensor& weights, const Tensor& scale,
              std::string_view precision) {
  return results_of<5>("flora_na", operators::flora_na, b, a, weights, scale, precision);
}

Five flora_na_list(const Tensors& b, const Tensors& a, const Tensor& weights, const Tensor& scale,
                   std::string_view precision) {
  return results_of<5>("flora_na_list", operators::flora_na_list, b, a, weights, scale, precision);
}

}  // namespace
}  // namespace fedlora

STABLE_TORCH_LIBRARY_IMPL(fedlora, FEDLORA_KEY, m) {
  m.impl("gram", TORCH_BOX(&fedlora::gram));
  m.impl("gram_list", TORCH_BOX(&fedlora::gram_list));
  m.impl("spectrum", TORCH_BOX(&fedlora::spectrum));
  m.impl("select_rank", TORCH_BOX(&fedlora::select_rank));
  m.impl("surrogate", TORCH_BOX(&fedlora::surrogate));
  m.impl("combine", TORCH_BOX(&fedlora::combine));
  m.impl("combine_list", TORCH_BOX(&fedlora::combine_list));
  m.impl("weighted_sum", TORCH_BOX(&fedlora::weighted_sum));
  m.impl("weighted_sum_list", TORCH_BOX(&fedlora::weighted_sum_list));
  m.impl("stacked_svd", TORCH_BOX(&fedlora::stacked_svd));
  m.impl("stacked_svd_list", TORCH_BOX(&fedlora::stacked_svd_list));
  m.impl("flora_na", TORCH_BOX(&fedlora::flora_na));
  m.impl("flora_na_list", TORCH_BOX(&fedlora::flora_na_list));
}
