#include "gram.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "memory.h"
#include "mirror.h"
#include "parallel.h"

namespace fedlora {

void gram(const Factors& x, bool fast, int threads, double* g) {
  const Kernels& kernel = kernels();
  const int64_t rank = x.rank;
  const bool single = fast && x.dtype != DType::fp64;
  const int64_t columns = kernel.tile_columns * (single ? 2 : 1);
  const int64_t tiles = (rank + columns - 1) / columns;
  const int64_t groups =
      std::clamp<int64_t>(team(gram_nanoseconds(x), threads), 1, std::max<int64_t>(tiles, 1));
  std::fill_n(g, rank * rank, 0.0);

  // Tile t costs t + 1 register tiles, so equal shares of work end at square roots.
  const auto bound = [&](int64_t group) {
    const double share = static_cast<double>(group) / static_cast<double>(groups);
    return std::llround(std::sqrt(share) * static_cast<double>(tiles));
  };
  parallel_for(groups, static_cast<int>(groups), [&](int64_t group) {
    if (bound(group) == bound(group + 1)) return;
    const Buffer<std::byte> scratch(static_cast<int64_t>(kernel.gram_scratch(rank)));
    kernel.gram(x, single, bound(group), bound(group + 1), g, scratch.get());
  });
  mirror(rank, g);
}

double gram_nanoseconds(const Factors& x) {
  const auto rank = static_cast<double>(x.rank);
  return rank * static_cast<double>(x.depth) * (0.7 + rank / 30);
}

}  // namespace fedlora
