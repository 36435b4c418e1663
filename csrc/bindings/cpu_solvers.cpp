// The answers of the core.
#include <algorithm>

#include "core/leading.h"
#include "core/stacked_svd.h"
#include "solvers.h"

namespace fedlora::operators {

std::vector<Step> solvers(const Problem& problem) {
  const int64_t smaller = std::min(problem.rows, problem.columns);
  const auto route = [&](int64_t rank) {
    return route_of(problem.fp64 != 0, problem.fast != 0, rank, smaller);
  };
  const Route own = route(problem.rank);
  const auto on_route = [&](int64_t rank) { return route(rank) == own; };
  if (own == Route::kQr) {
    return {step_of("QR of both factors, SVD of the core", "float64 data in exact precision",
                    problem.rank, on_route)};
  }
  const bool dense = own == Route::kSmallerSide;
  const std::string matrix = dense ? " of the update's smaller side" : " of R x R";
  const std::string limits = dense ? "R >= min(m, n)" : "R < min(m, n)";
  const auto krylov = [&](int64_t rank) {
    return route(rank) == own &&
           krylov_pays(dense ? smaller : rank, problem.energy, std::min(problem.cap, rank));
  };
  std::vector<Step> steps;
  if (krylov(problem.rank)) {
    steps.push_back(step_of("block Krylov space" + matrix + ", until the trace proves it enough",
                            limits + "; measured on an AMD EPYC", problem.rank, krylov));
  }
  steps.push_back(step_of("tridiagonal matrix" + matrix, limits, problem.rank, on_route));
  return steps;
}

}  // namespace fedlora::operators
