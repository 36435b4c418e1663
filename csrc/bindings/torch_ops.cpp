// The CPU kernels of torch.ops.fedlora, on LibTorch's stable ABI: one build for every Python and
// every torch from 2.10 on. Schemas and fakes are declared by fedlora_kernels/ops; this only
// registers implementations, with the same checks and sentences.
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

// Runs an operator and returns its N results. Mistakes become RuntimeErrors that name it.
template <size_t N, class F>
auto results_of(const char* name, F&& run) {
  Tensors results;
  const Host host = {[&](Scalar scalar, const Sizes& sizes) {
                       results.push_back(torch::stable::empty(sizes, type_of(scalar)));
                       Array array = array_of(results.back());
                       array.data = results.back().mutable_data_ptr();
                       return array;
                     },
                     static_cast<int>(torch::stable::get_num_threads())};
  try {
    run(host);
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
  return std::get<0>(results_of<1>("gram", [&](const Host& host) {
    operators::gram(host, array_of(x), rows, std::string(precision));
  }));
}

Tensor gram_list(const Tensors& x, int64_t modules, bool rows, std::string_view precision) {
  return std::get<0>(results_of<1>("gram_list", [&](const Host& host) {
    operators::gram_list(host, arrays_of(x), modules, rows, std::string(precision));
  }));
}

Five spectrum(const Tensor& gram_b, const Tensor& gram_a, const Tensor& scale, double energy,
              MaxRank max_rank) {
  return results_of<5>("spectrum", [&](const Host& host) {
    operators::spectrum(host, array_of(gram_b), array_of(gram_a), array_of(scale), energy,
                        max_rank);
  });
}

Tensor select_rank(const Tensor& sigma, const Tensor& total_energy, double energy,
                   MaxRank max_rank) {
  return std::get<0>(results_of<1>("select_rank", [&](const Host& host) {
    operators::select_rank(host, array_of(sigma), array_of(total_energy), energy, max_rank);
  }));
}

Three surrogate(const Tensor& gram_b, const Tensor& gram_a, const Tensor& weights,
                const Tensor& scale, int64_t max_sweeps, double tol) {
  return results_of<3>("surrogate", [&](const Host& host) {
    operators::surrogate(host, array_of(gram_b), array_of(gram_a), array_of(weights),
                         array_of(scale), max_sweeps, tol);
  });
}

Two combine(const Tensor& b, const Tensor& a, const Tensor& x, const Tensor& y) {
  return results_of<2>("combine", [&](const Host& host) {
    operators::combine(host, array_of(b), array_of(a), array_of(x), array_of(y));
  });
}

Two combine_list(const Tensors& b, const Tensors& a, const Tensor& x, const Tensor& y) {
  return results_of<2>("combine_list", [&](const Host& host) {
    operators::combine_list(host, arrays_of(b), arrays_of(a), array_of(x), array_of(y));
  });
}

Tensor weighted_sum(const Tensor& stacked, const Tensor& weights) {
  return std::get<0>(results_of<1>("weighted_sum", [&](const Host& host) {
    operators::weighted_sum(host, array_of(stacked), array_of(weights));
  }));
}

Tensor weighted_sum_list(const Tensors& factors, const Tensor& weights) {
  return std::get<0>(results_of<1>("weighted_sum_list", [&](const Host& host) {
    operators::weighted_sum_list(host, arrays_of(factors), array_of(weights));
  }));
}

Four stacked_svd(const Tensor& b, const Tensor& a, const Tensor& scale, double energy,
                 MaxRank max_rank, std::string_view precision) {
  return results_of<4>("stacked_svd", [&](const Host& host) {
    operators::stacked_svd(host, array_of(b), array_of(a), array_of(scale), energy, max_rank,
                           std::string(precision));
  });
}

Four stacked_svd_list(const Tensors& b, const Tensors& a, const Tensor& scale, double energy,
                      MaxRank max_rank, std::string_view precision) {
  return results_of<4>("stacked_svd_list", [&](const Host& host) {
    operators::stacked_svd_list(host, arrays_of(b), arrays_of(a), array_of(scale), energy, max_rank,
                                std::string(precision));
  });
}

Five flora_na(const Tensor& b, const Tensor& a, const Tensor& weights, const Tensor& scale,
              std::string_view precision) {
  return results_of<5>("flora_na", [&](const Host& host) {
    operators::flora_na(host, array_of(b), array_of(a), array_of(weights), array_of(scale),
                        std::string(precision));
  });
}

Five flora_na_list(const Tensors& b, const Tensors& a, const Tensor& weights, const Tensor& scale,
                   std::string_view precision) {
  return results_of<5>("flora_na_list", [&](const Host& host) {
    operators::flora_na_list(host, arrays_of(b), arrays_of(a), array_of(weights), array_of(scale),
                             std::string(precision));
  });
}

}  // namespace
}  // namespace fedlora

STABLE_TORCH_LIBRARY_IMPL(fedlora, CPU, m) {
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
