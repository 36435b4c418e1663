// rank: the smallest p whose singular values hold the wanted share of the energy, per module, on
// the device; the rule and its ties are those of core/rank.h.
//
//   sum_{i<=p} sigma_i^2 >= (energy - 4 R eps) total
//
// What counts as zero (docs/kernels.md) has been set to zero by spectrum; sigma_i^2 <= R eps
// sigma_1^2 is looked at again.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace fedlora::cuda {

// sigma [modules, rank] descending, total_energy [modules]; ranks [modules].
void select_rank(int64_t modules, int64_t rank, const double* sigma, const double* total_energy,
                 double energy, int64_t cap, int64_t* ranks, Stream stream);

}  // namespace fedlora::cuda
