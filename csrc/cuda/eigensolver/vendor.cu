#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "vendor.h"

#ifdef __CUDACC__
#include <dlfcn.h>

#include <map>
#include <vector>
#else
#include "core/lapack.h"
#endif

namespace fedlora::cuda::vendor {

#ifdef __CUDACC__
namespace {

// cuSOLVER's types and constants as its ABI has them.
using Handle = void*;
using Parameters = void*;
constexpr int kVectors = 1;
constexpr int kLower = 0;
constexpr int kDouble = 1;

struct Functions {
  int (*create)(Handle*);
  int (*create_parameters)(Parameters*);
  int (*set_stream)(Handle, cudaStream_t);
  int (*size)(Handle, Parameters, int, int, int64_t, int, const void*, int64_t, int, const void*,
              int, size_t*, size_t*, int64_t);
  int (*solve)(Handle, Parameters, int, int, int64_t, int, void*, int64_t, int, void*, int, void*,
               size_t, void*, size_t, int*, int64_t);
};

template <class F>
void find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  if (function != nullptr) return;
  throw std::runtime_error(std::string("cuSOLVER has no ") + name +
                           ": stacked ranks of this size need CUDA 12.6.2 or later");
}

// The one that belongs to this build's CUDA runtime: beside the runtime, which is where pip puts it
// ("nvidia/cu13/lib" for all of CUDA 13, "nvidia/<library>/lib" each before) and no linker looks;
// else by its name. A toolkit that the linker knows must not come first: torch, which loads
// cuSOLVER when it first needs it, would be given the toolkit's.
void* open_library() {
  const std::string name = CUDART_VERSION >= 13000 ? "libcusolver.so.12" : "libcusolver.so.11";
  std::vector<std::string> places;
  Dl_info runtime = {};
  if (dladdr(reinterpret_cast<const void*>(&cudaGetDevice), &runtime) != 0) {
    const std::string file = runtime.dli_fname;
    const std::string folder = file.substr(0, file.rfind('/') + 1);
    places.push_back(folder + name);
    places.push_back(folder + "../../cusolver/lib/" + name);
  }
  places.push_back(name);
  for (const std::string& place : places) {
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) return library;
  }
  throw std::runtime_error(name + " was not found: stacked ranks of this size need it");
}

Functions load() {
  void* library = open_library();
  Functions found = {};
  find(library, "cusolverDnCreate", found.create);
  find(library, "cusolverDnCreateParams", found.create_parameters);
  find(library, "cusolverDnSetStream", found.set_stream);
  find(library, "cusolverDnXsyevBatched_bufferSize", found.size);
  find(library, "cusolverDnXsyevBatched", found.solve);
  return found;
}

const Functions& functions() {
  static const Functions found = load();
  return found;
}

void expect(int status, const char* call) {
  if (status == 0) return;
  throw std::runtime_error(std::string(call) + " failed with status " + std::to_string(status));
}

// One per thread and device, kept: to make one takes milliseconds, and the solver may still use the
// host's memory when its call has returned.
struct Context {
  Handle handle = nullptr;
  Parameters parameters = nullptr;
  std::vector<char> host;
};

Context& context() {
  thread_local std::map<int, Context> contexts;
  int index = 0;
  check(cudaGetDevice(&index));
  Context& found = contexts[index];
  if (found.handle == nullptr) expect(functions().create(&found.handle), "cusolverDnCreate");
  if (found.parameters == nullptr) {
    expect(functions().create_parameters(&found.parameters), "cusolverDnCreateParams");
  }
  return found;
}

struct Bytes {
  size_t device;
  size_t host;
};

Bytes bytes_for(const Context& own, int64_t modules, int64_t n) {
  Bytes bytes = {};
  expect(functions().size(own.handle, own.parameters, kVectors, kLower, n, kDouble, nullptr, n,
                          kDouble, nullptr, kDouble, &bytes.device, &bytes.host, modules),
         "cusolverDnXsyevBatched_bufferSize");
  return bytes;
}

// n lda batch must not exceed the largest int.
int64_t most_modules(int64_t n) {
  return std::max<int64_t>(std::numeric_limits<int>::max() / (n * n), 1);
}

}  // namespace

size_t symmetric_eigen_workspace(int64_t modules, int64_t n) {
  return bytes_for(context(), std::min(modules, most_modules(n)), n).device;
}

void symmetric_eigen(int64_t modules, int64_t n, const int* solved, double* matrices,
                     double* values, int* info, void* workspace, Stream stream) {
  std::vector<int> done(static_cast<size_t>(modules), 0);
  if (solved != nullptr) {
    const size_t bytes = done.size() * sizeof(int);
    check(cudaMemcpyAsync(done.data(), solved, bytes, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
  }
  Context& own = context();
  expect(functions().set_stream(own.handle, stream), "cusolverDnSetStream");
  for (int64_t first = 0, batch = 1; first < modules; first += batch, batch = 1) {
    if (done[first] != 0) continue;
    const int64_t most = std::min(most_modules(n), modules - first);
    while (batch < most && done[first + batch] == 0) ++batch;
    const Bytes bytes = bytes_for(own, batch, n);
    // What lies there before may come out as wrong eigenvectors (11.7.1).
    check(cudaMemsetAsync(workspace, 0, bytes.device, stream));
    if (own.host.size() < bytes.host) {
      check(cudaDeviceSynchronize());  // an earlier call may still read what is freed
      own.host.resize(bytes.host);
    }
    expect(functions().solve(own.handle, own.parameters, kVectors, kLower, n, kDouble,
                             matrices + first * n * n, n, kDouble, values + first * n, kDouble,
                             workspace, bytes.device, own.host.data(), bytes.host, info + first,
                             batch),
           "cusolverDnXsyevBatched");
  }
}

#else

size_t symmetric_eigen_workspace(int64_t, int64_t) { return 0; }

void symmetric_eigen(int64_t modules, int64_t n, const int* solved, double* matrices,
                     double* values, int* info, void*, Stream) {
  for (int64_t module = 0; module < modules; ++module) {
    if (solved != nullptr && solved[module] != 0) continue;
    info[module] =
        lapack::symmetric_eigen(n, matrices + module * n * n, values + module * n) ? 0 : 1;
  }
}

#endif

}  // namespace fedlora::cuda::vendor
