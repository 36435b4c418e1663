// fedlora_kernels._numpy: the operators on numpy arrays, without torch. fedlora_kernels/numpy.py is
// its public face.
//
// bfloat16 is ml_dtypes.bfloat16, which numpy knows by its name only. The interpreter's lock is
// released while an operator computes; results are allocated under it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "operators.h"

namespace py = pybind11;

namespace fedlora {
namespace {

using Values = std::vector<py::array>;

Scalar scalar_of(std::string_view name) {
  if (name == "bfloat16") return Scalar::bf16;
  if (name == "float16") return Scalar::fp16;
  if (name == "float32") return Scalar::fp32;
  if (name == "float64") return Scalar::fp64;
  if (name == "int64") return Scalar::int64;
  return Scalar::other;
}

py::dtype dtype_of(Scalar scalar) {
  switch (scalar) {
    case Scalar::bf16:
      return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
    case Scalar::fp16:
      return py::dtype("float16");
    case Scalar::fp32:
      return py::dtype("float32");
    case Scalar::int64:
      return py::dtype("int64");
    default:
      return py::dtype("float64");
  }
}

// A name for as long as the process lives; asking numpy for it takes microseconds, so that the
// usual types are told by kind and size.
const char* name_of(const py::dtype& dtype) {
  if (dtype.kind() == 'f' && dtype.itemsize() == 4) return "float32";
  if (dtype.kind() == 'f' && dtype.itemsize() == 8) return "float64";
  if (dtype.kind() == 'f' && dtype.itemsize() == 2) return "float16";
  static std::set<std::string> names;  // under the interpreter's lock
  return names.insert(py::str(dtype.attr("name")).cast<std::string>()).first->c_str();
}

Array array_of(const py::array& array) {
  const py::dtype dtype = array.dtype();
  const char* name = name_of(dtype);
  const bool swapped = dtype.byteorder() != '=' && dtype.byteorder() != '|';
  // Strides that are no whole number of elements (a field of a record, say) have to be copied.
  const py::ssize_t size = std::max<py::ssize_t>(1, array.itemsize());  // a record may be empty
  bool whole =
      !swapped && reinterpret_cast<uintptr_t>(array.data()) % static_cast<size_t>(size) == 0;
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) whole &= array.strides(axis) % size == 0;
  if (!whole) {
    throw WrongValue("arrays must be aligned and in native byte order; copy them with numpy.array");
  }
  Array result = {const_cast<void*>(array.data()), scalar_of(name), name, {}, {}};
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    result.sizes.push_back(array.shape(axis));
    result.strides.push_back(array.strides(axis) / size);
  }
  return result;
}

Arrays arrays_of(const Values& values) {
  Arrays arrays;
  for (const py::array& value : values) arrays.push_back(array_of(value));
  return arrays;
}

// Runs an operator without the lock; a single result comes alone, several as a tuple.
template <class F>
py::object results_of(int threads, F&& run) {
  Values results;
  const Host host = {[&](Scalar scalar, const Sizes& sizes) {
                       const py::gil_scoped_acquire lock;
                       const py::array& made = results.emplace_back(
                           dtype_of(scalar), std::vector<int64_t>(sizes.begin(), sizes.end()));
                       return array_of(made);
                     },
                     threads};
  {
    const py::gil_scoped_release unlock;
    run(host);
  }
  if (results.size() == 1) return results.front();
  py::tuple all(results.size());
  for (size_t i = 0; i < results.size(); ++i) all[i] = std::move(results[i]);
  return all;
}

// What Python hands over for an argument of an operator, and what the operator gets of it.
template <class T>
struct Argument {
  using Handed = T;
};
template <>
struct Argument<Array> {
  using Handed = const py::array&;
};
template <>
struct Argument<Arrays> {
  using Handed = const Values&;
};

Array taken(const py::array& value) { return array_of(value); }
Arrays taken(const Values& values) { return arrays_of(values); }
template <class T>
T taken(const T& value) {
  return value;
}

// An operator as a function of Python, its signature deduced: the operator's arguments, then how
// many threads it may use.
template <auto run, class = decltype(run)>
struct Function;

template <auto run, class... T>
struct Function<run, void (*)(const Host&, T...)> {
  static py::object call(typename Argument<std::decay_t<T>>::Handed... arguments, int threads) {
    const auto views = std::make_tuple(taken(arguments)...);
    return results_of(threads, [&](const Host& host) {
      std::apply([&](const auto&... view) { run(host, view...); }, views);
    });
  }
};

template <auto run>
constexpr auto function = &Function<run>::call;

}  // namespace
}  // namespace fedlora

PYBIND11_MODULE(_numpy, m) {
  using fedlora::function;
  namespace operators = fedlora::operators;
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const fedlora::WrongType& mistake) {
      PyErr_SetString(PyExc_TypeError, mistake.what());
    }
  });
  m.def("gram", function<operators::gram>);
  m.def("gram_list", function<operators::gram_list>);
  m.def("spectrum", function<operators::spectrum>);
  m.def("select_rank", function<operators::select_rank>);
  m.def("client_products", function<operators::client_products>);
  m.def("surrogate", function<operators::surrogate>);
  m.def("combine", function<operators::combine>);
  m.def("combine_list", function<operators::combine_list>);
  m.def("weighted_sum", function<operators::weighted_sum>);
  m.def("weighted_sum_list", function<operators::weighted_sum_list>);
  m.def("stacked_svd", function<operators::stacked_svd>);
  m.def("stacked_svd_list", function<operators::stacked_svd_list>);
  m.def("flora_na", function<operators::flora_na>);
  m.def("flora_na_list", function<operators::flora_na_list>);
}
