// The answers of the kernels, for the current device.
#include "cuda/eigensolver/eigensolver.h"
#include "cuda/spectrum/leading.h"
#include "solvers.h"

namespace fedlora::operators {
namespace {

std::string place_of(const cuda::Attempt& attempt) {
  if (attempt.blocks == 0) return "device memory";
  if (attempt.blocks == 1) return "one block's shared memory";
  return "the shared memory of " + std::to_string(attempt.blocks) + " blocks";
}

std::string name_of(const cuda::Eigensolver& solver) {
  if (solver.blocks == 0) return "cusolverDnXsyevBatched";
  if (solver.blocks == 1) return "one-sided Jacobi in one block";
  return "one-sided Jacobi in a cluster of " + std::to_string(solver.blocks) + " blocks";
}

}  // namespace

std::vector<Step> solvers(const Problem& problem) {
  const cuda::SpectrumOptions options = {problem.energy, problem.cap, 0};
  const auto attempts = [&](int64_t rank) { return cuda::leading_attempts(rank, options); };
  const auto own = attempts(problem.rank);
  std::vector<Step> steps;
  for (size_t i = 0; i < own.size(); ++i) {
    steps.push_back(step_of("block subspace iteration, " + std::to_string(own[i].vectors) +
                                " vectors in " + place_of(own[i]),
                            "what shared memory holds", problem.rank, [&](int64_t rank) {
                              const auto others = attempts(rank);
                              return others.size() > i && others[i].blocks == own[i].blocks;
                            }));
  }
  const cuda::Eigensolver solver = cuda::eigensolver_of(problem.rank, false);
  steps.push_back(step_of(name_of(solver), solver.source, problem.rank, [&](int64_t rank) {
    return cuda::eigensolver_of(rank, false).blocks == solver.blocks;
  }));
  return steps;
}

}  // namespace fedlora::operators
