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
    Host host = {[&](Scalar scalar, const Sizes& sizes) {
                   results.push_back(
                       torch::stable::empty(sizes, type_of(scalar), std::nullopt, place.device()));
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
