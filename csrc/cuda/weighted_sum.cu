// weighted_sum: out_i = sum_k w_k source_k,i, for any number of tensors in one launch.
//
// Layout     A thread makes 16 bytes of the result and reads as many of every source, four sources
//            in flight: with 768 threads on an SM that is 48 KB, where 4.3 TB/s over 132 SMs and
//            0.8 us of latency need 26. What is not aligned to 16 bytes, or not a whole unit, is
//            read and written element by element.
// Precision  float64 sums in registers, in the order of the clients, rounded once.
// Memory     No shared memory.
#include "weighted_sum.h"

namespace fedlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;

template <class S>
struct alignas(16) Unit {
  S at[16 / sizeof(S)];
};

__device__ __forceinline__ bool aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

template <class S>
__device__ __forceinline__ Unit<S> read(const S* from, int count) {
  constexpr int kE = 16 / sizeof(S);
  if (count == kE && aligned(from)) return *reinterpret_cast<const Unit<S>*>(from);
  Unit<S> unit;
#pragma unroll
  for (int e = 0; e < kE; ++e) unit.at[e] = e < count ? from[e] : narrow<S>(0.0F);
  return unit;
}

template <class S>
__global__ void __launch_bounds__(kThreads) sum_units(Sources x, Weights weights, S* out) {
  constexpr int kE = 16 / sizeof(S);
  const int64_t units = (x.columns + kE - 1) / kE;  // of one run
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t module = number / (x.rows * units);
  if (module >= x.modules) return;
  const int64_t row = number / units % x.rows;
  const int64_t column = number % units * kE;
  const int count = x.columns - column < kE ? static_cast<int>(x.columns - column) : kE;
  const double* first = weights.first + module * weights.module_stride;
  const double* second =
      weights.second == nullptr ? nullptr : weights.second + module * weights.module_stride;

  const auto source = [&](int64_t client) {
    if (x.table == nullptr) {
      return static_cast<const S*>(x.data) + module * x.module_stride + client * x.client_stride +
             row * x.stride + column;
    }
    const Source& listed = x.table[module * x.clients + client];
    return static_cast<const S*>(listed.data) + row * listed.stride + column;
  };
  double sum[kE] = {};
  const auto add = [&](const Unit<S>& unit, int64_t client) {
    double weight = __ldg(first + client);
    if (second != nullptr) weight *= __ldg(second + client);
#pragma unroll
    for (int e = 0; e < kE; ++e) sum[e] = fma(weight, widen<double>(unit.at[e]), sum[e]);
  };
  int64_t client = 0;
  for (; client + kAhead <= x.clients; client += kAhead) {
    Unit<S> read_ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) read_ahead[i] = read(source(client + i), count);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) add(read_ahead[i], client + i);
  }
  for (; client < x.clients; ++client) add(read(source(client), count), client);

  S* to = out + (module * x.rows + row) * x.columns + column;
  Unit<S> rounded;
#pragma unroll
  for (int e = 0; e < kE; ++e) rounded.at[e] = narrow<S>(sum[e]);
  if (count == kE && aligned(to)) {
    *reinterpret_cast<Unit<S>*>(to) = rounded;
  } else {
#pragma unroll
    for (int e = 0; e < kE; ++e) {
      if (e < count) to[e] = rounded.at[e];
    }
  }
}

template <class S>
void run(const Sources& x, const Weights& weights, void* out, Stream stream) {
  constexpr int64_t kE = 16 / sizeof(S);
  const int64_t units = x.modules * x.rows * ((x.columns + kE - 1) / kE);
  launch(sum_units<S>, dim3(static_cast<unsigned>((units + kThreads - 1) / kThreads)), kThreads, 0,
         stream, x, weights, static_cast<S*>(out));
}

}  // namespace

void weighted_sum(const Sources& sources, const Weights& weights, void* out, Stream stream) {
  Sources x = sources;
  if (x.modules * x.rows * x.columns == 0) return;
  if (x.table == nullptr && x.stride == x.columns) {  // one long run
    x.columns *= x.rows;
    x.rows = 1;
  }
  switch (x.dtype) {
    case DType::bf16:
      return run<bf16>(x, weights, out, stream);
    case DType::fp16:
      return run<fp16>(x, weights, out, stream);
    case DType::fp32:
      return run<float>(x, weights, out, stream);
    case DType::fp64:
      return run<double>(x, weights, out, stream);
  }
}

}  // namespace fedlora::cuda
