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
#include <vector>

#include "operators.h"

namespace py = pybind11;

namespace fedlora {
namespace {

using Values = std::vector<py::array>;
using MaxRank = std::optional<int64_t>;

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

py::object gram(const py::array& x, bool rows, const std::string& precision, int threads) {
  const Array view = array_of(x);
  return results_of(threads,
                    [&](const Host& host) { operators::gram(host, view, rows, precision); });
}

py::object gram_list(const Values& x, int64_t modules, bool rows, const std::string& precision,
                     int threads) {
  const Arrays view = arrays_of(x);
  return results_of(threads, [&](const Host& host) {
    operators::gram_list(host, view, modules, rows, precision);
  });
}

py::object spectrum(const py::array& gram_b, const py::array& gram_a, const py::array& scale,
                    double energy, MaxRank max_rank, int threads) {
  const Arrays views = arrays_of({gram_b, gram_a, scale});
  return results_of(threads, [&](const Host& host) {
    operators::spectrum(host, views[0], views[1], views[2], energy, max_rank);
  });
}

py::object select_rank(const py::array& sigma, const py::array& total_energy, double energy,
                       MaxRank max_rank) {
  const Arrays views = arrays_of({sigma, total_energy});
  return results_of(1, [&](const Host& host) {
    operators::select_rank(host, views[0], views[1], energy, max_rank);
  });
}

py::object surrogate(const py::array& gram_b, const py::array& gram_a, const py::array& weights,
                     const py::array& scale, int64_t max_sweeps, double tol, int threads) {
  const Arrays views = arrays_of({gram_b, gram_a, weights, scale});
  return results_of(threads, [&](const Host& host) {
    operators::surrogate(host, views[0], views[1], views[2], views[3], max_sweeps, tol);
  });
}

py::object combine(const py::array& b, const py::array& a, const py::array& x, const py::array& y,
                   int threads) {
  const Arrays views = arrays_of({b, a, x, y});
  return results_of(threads, [&](const Host& host) {
    operators::combine(host, views[0], views[1], views[2], views[3]);
  });
}

py::object combine_list(const Values& b, const Values& a, const py::array& x, const py::array& y,
                        int threads) {
  const Arrays left = arrays_of(b);
  const Arrays right = arrays_of(a);
  const Arrays views = arrays_of({x, y});
  return results_of(threads, [&](const Host& host) {
    operators::combine_list(host, left, right, views[0], views[1]);
  });
}

py::object weighted_sum(const py::array& stacked, const py::array& weights, int threads) {
  const Arrays views = arrays_of({stacked, weights});
  return results_of(threads,
                    [&](const Host& host) { operators::weighted_sum(host, views[0], views[1]); });
}

py::object weighted_sum_list(const Values& factors, const py::array& weights, int threads) {
  const Arrays list = arrays_of(factors);
  const Array view = array_of(weights);
  return results_of(threads,
                    [&](const Host& host) { operators::weighted_sum_list(host, list, view); });
}

py::object stacked_svd(const py::array& b, const py::array& a, const py::array& scale,
                       double energy, MaxRank max_rank, const std::string& precision, int threads) {
  const Arrays views = arrays_of({b, a, scale});
  return results_of(threads, [&](const Host& host) {
    operators::stacked_svd(host, views[0], views[1], views[2], energy, max_rank, precision);
  });
}

py::object stacked_svd_list(const Values& b, const Values& a, const py::array& scale, double energy,
                            MaxRank max_rank, const std::string& precision, int threads) {
  const Arrays left = arrays_of(b);
  const Arrays right = arrays_of(a);
  const Array view = array_of(scale);
  return results_of(threads, [&](const Host& host) {
    operators::stacked_svd_list(host, left, right, view, energy, max_rank, precision);
  });
}

py::object flora_na(const py::array& b, const py::array& a, const py::array& weights,
                    const py::array& scale, const std::string& precision, int threads) {
  const Arrays views = arrays_of({b, a, weights, scale});
  return results_of(threads, [&](const Host& host) {
    operators::flora_na(host, views[0], views[1], views[2], views[3], precision);
  });
}

py::object flora_na_list(const Values& b, const Values& a, const py::array& weights,
                         const py::array& scale, const std::string& precision, int threads) {
  const Arrays left = arrays_of(b);
  const Arrays right = arrays_of(a);
  const Arrays views = arrays_of({weights, scale});
  return results_of(threads, [&](const Host& host) {
    operators::flora_na_list(host, left, right, views[0], views[1], precision);
  });
}

}  // namespace
}  // namespace fedlora

PYBIND11_MODULE(_numpy, m) {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const fedlora::WrongType& mistake) {
      PyErr_SetString(PyExc_TypeError, mistake.what());
    }
  });
  m.def("gram", &fedlora::gram);
  m.def("gram_list", &fedlora::gram_list);
  m.def("spectrum", &fedlora::spectrum);
  m.def("select_rank", &fedlora::select_rank);
  m.def("surrogate", &fedlora::surrogate);
  m.def("combine", &fedlora::combine);
  m.def("combine_list", &fedlora::combine_list);
  m.def("weighted_sum", &fedlora::weighted_sum);
  m.def("weighted_sum_list", &fedlora::weighted_sum_list);
  m.def("stacked_svd", &fedlora::stacked_svd);
  m.def("stacked_svd_list", &fedlora::stacked_svd_list);
  m.def("flora_na", &fedlora::flora_na);
  m.def("flora_na_list", &fedlora::flora_na_list);
}
