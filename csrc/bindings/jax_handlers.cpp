// The operators as handlers of XLA's foreign function interface, for
// fedlora_kernels/interop/jax.py: libfedlora_jax on the core, libfedlora_jax_cuda (FEDLORA_CUDA) on
// the kernels of csrc/cuda. Both need jaxlib's headers and neither jaxlib nor Python.
//
// A call has the operator's arrays as buffers and its other arguments as attributes, named by their
// position; max_rank is left out where it is None. Under vmap all buffers have further dimensions
// in front, and the operator runs once for each of their entries: `dims` says how many dimensions
// the first array has by itself.
#include <xla/ffi/api/ffi.h>

#include <cfenv>
#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "operators.h"
#include "views.h"

namespace fedlora {
namespace {

namespace ffi = xla::ffi;

struct Type {
  Scalar scalar;
  const char* name;
};

Type described(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16:
      return {Scalar::bf16, "bfloat16"};
    case ffi::DataType::F16:
      return {Scalar::fp16, "float16"};
    case ffi::DataType::F32:
      return {Scalar::fp32, "float32"};
    case ffi::DataType::F64:
      return {Scalar::fp64, "float64"};
    case ffi::DataType::S64:
      return {Scalar::int64, "int64"};
    default:
      return {Scalar::other, "another type"};
  }
}

template <class T>
T value_of(ffi::ErrorOr<T> value) {
  if (value.has_error()) throw std::runtime_error(value.error().message());
  return *std::move(value);
}

// The arithmetic of IEEE 754 while this lives, in this thread and those that it starts. XLA calls
// with subnormal numbers taken for zero, which float16 factors do have.
class Arithmetic {
 public:
  Arithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~Arithmetic() { std::fesetenv(&before_); }
  Arithmetic(const Arithmetic&) = delete;
  Arithmetic& operator=(const Arithmetic&) = delete;

 private:
  std::fenv_t before_;
};

// One buffer as arrays: entry `entry` of the `batch` dimensions in front.
struct Buffers {
  ffi::AnyBuffer buffer;
  size_t batch;

  int64_t entries() const {
    int64_t count = 1;
    for (size_t axis = 0; axis < batch; ++axis) count *= buffer.dimensions()[axis];
    return count;
  }

  Array entry(int64_t index) const {
    const auto dimensions = buffer.dimensions();
    const Type type = described(buffer.element_type());
    const Sizes sizes(dimensions.begin() + batch, dimensions.end());
    const int64_t bytes = elements(sizes) * static_cast<int64_t>(ByteWidth(buffer.element_type()));
    return {static_cast<char*>(buffer.untyped_data()) + index * bytes, type.scalar, type.name,
            sizes, contiguous_strides(sizes)};
  }
};

// An operator's arguments in their order.
class Reader {
 public:
  Reader(ffi::RemainingArgs arrays, ffi::Dictionary attributes)
      : arrays_(arrays), attributes_(attributes) {
    const auto dims = static_cast<size_t>(value_of(attributes.get<int64_t>("dims")));
    batch_ = value_of(arrays.get<ffi::AnyBuffer>(0)).dimensions().size() - dims;
  }

  size_t batch() const { return batch_; }

  template <class T>
  auto next() {
    const std::string name = "argument_" + std::to_string(position_++);
    if constexpr (std::is_same_v<T, Array>) {
      return Buffers{value_of(arrays_.get<ffi::AnyBuffer>(array_++)), batch_};
    } else if constexpr (std::is_same_v<T, operators::MaxRank>) {
      return attributes_.contains(name) ? T(value_of(attributes_.get<int64_t>(name))) : T();
    } else if constexpr (std::is_same_v<T, std::string>) {
      return std::string(value_of(attributes_.get<std::string_view>(name)));
    } else if constexpr (std::is_same_v<T, std::vector<int64_t>>) {
      const auto values = value_of(attributes_.get<ffi::Span<const int64_t>>(name));
      return T(values.begin(), values.end());
    } else {
      return value_of(attributes_.get<T>(name));
    }
  }

 private:
  ffi::RemainingArgs arrays_;
  ffi::Dictionary attributes_;
  size_t batch_ = 0;
  size_t position_ = 0;
  size_t array_ = 0;
};

Array at(const Buffers& buffers, int64_t entry) { return buffers.entry(entry); }
template <class T>
const T& at(const T& value, int64_t) {
  return value;
}

// An operator as a handler, its signature deduced.
template <auto run, class = decltype(run)>
struct Function;

template <auto run, class... T>
struct Function<run, void (*)(const Host&, T...)> {
  static ffi::Error call(const DeviceMemory* device, ffi::RemainingArgs arrays,
                         ffi::RemainingRets results, ffi::Dictionary attributes) {
    const Arithmetic arithmetic;
    try {
      Reader reader(arrays, attributes);
      const std::tuple arguments{reader.next<std::decay_t<T>>()...};
      std::vector<Buffers> places;
      for (size_t i = 0; i < results.size(); ++i) {
        places.push_back({*value_of(results.get<ffi::AnyBuffer>(i)), reader.batch()});
      }
      size_t next = 0;
      int64_t entry = 0;
      const Host host = {
          [&](Scalar scalar, const Sizes& sizes) {
            const Array place = places.at(next++).entry(entry);
            if (place.scalar == scalar && place.sizes == sizes) return place;
            throw std::runtime_error("a result has another type or shape than was declared");
          },
          static_cast<int>(value_of(attributes.get<int64_t>("threads"))), device};
      for (; entry < places.front().entries(); ++entry) {
        next = 0;
        std::apply([&](const auto&... argument) { run(host, at(argument, entry)...); }, arguments);
      }
    } catch (const std::invalid_argument& mistake) {
      return ffi::Error::InvalidArgument(mistake.what());
    } catch (const std::exception& error) {
      return ffi::Error::Internal(error.what());
    }
    return ffi::Error::Success();
  }
};

#ifdef FEDLORA_CUDA
template <auto run>
ffi::Error call(void* stream, ffi::ScratchAllocator scratch, ffi::RemainingArgs arrays,
                ffi::RemainingRets results, ffi::Dictionary attributes) {
  const DeviceMemory device = {
      [&](size_t bytes) {
        const std::optional<void*> memory = scratch.Allocate(bytes, 256);
        if (!memory) throw std::runtime_error("no device memory for a workspace");
        return *memory;
      },
      [](const void*, size_t) -> const void* {  // of lists, which have no handlers
        throw std::logic_error("a table cannot be uploaded");
      },
      stream};
  return Function<run>::call(&device, arrays, results, attributes);
}
const auto kContext = [] {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::ScratchAllocator>();
};
#else
template <auto run>
ffi::Error call(ffi::RemainingArgs arrays, ffi::RemainingRets results, ffi::Dictionary attributes) {
  return Function<run>::call(nullptr, arrays, results, attributes);
}
const auto kContext = [] { return ffi::Ffi::Bind(); };
#endif

template <auto run>
XLA_FFI_Error* handled(XLA_FFI_CallFrame* frame) {
  static const auto handler =
      kContext().RemainingArgs().RemainingRets().template Attrs<ffi::Dictionary>().To(call<run>);
  return handler->Call(frame);
}

}  // namespace
}  // namespace fedlora

#define FEDLORA_HANDLER(name)                                                      \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* fedlora_##name( \
      XLA_FFI_CallFrame* frame) {                                                  \
    return fedlora::handled<fedlora::operators::name>(frame);                      \
  }

FEDLORA_HANDLER(gram)
FEDLORA_HANDLER(spectrum)
FEDLORA_HANDLER(select_rank)
FEDLORA_HANDLER(client_products)
FEDLORA_HANDLER(surrogate)
FEDLORA_HANDLER(combine)
FEDLORA_HANDLER(weighted_sum)
FEDLORA_HANDLER(stacked_svd)
FEDLORA_HANDLER(flora_na)
