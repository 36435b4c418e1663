// copy: to[i] = from[offset(i)], one element a thread; widened where S and T differ.
#include "copy.h"

namespace fedlora::cuda {
namespace {

constexpr int kThreads = 256;

template <class S, class T>
__global__ void __launch_bounds__(kThreads) copy_elements(Strided from, int64_t count, T* to) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= count) return;
  int64_t rest = number;
  int64_t offset = 0;
  for (int axis = from.dimensions - 1; axis >= 0; --axis) {
    offset += rest % from.sizes[axis] * from.strides[axis];
    rest /= from.sizes[axis];
  }
  to[number] = static_cast<T>(static_cast<const S*>(from.data)[offset]);
}

template <class S, class T>
void run(const Strided& from, T* to, Stream stream) {
  int64_t count = 1;
  for (int axis = 0; axis < from.dimensions; ++axis) count *= from.sizes[axis];
  if (count == 0) return;
  launch(copy_elements<S, T>, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)),
         kThreads, 0, stream, from, count, to);
}

}  // namespace

void copy(const Strided& from, int64_t bytes, void* to, Stream stream) {
  if (bytes == 2) return run<uint16_t>(from, static_cast<uint16_t*>(to), stream);
  if (bytes == 4) return run<uint32_t>(from, static_cast<uint32_t*>(to), stream);
  run<uint64_t>(from, static_cast<uint64_t*>(to), stream);
}

void widen_floats(const Strided& from, double* to, Stream stream) { run<float>(from, to, stream); }

}  // namespace fedlora::cuda
