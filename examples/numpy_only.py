"""Aggregate the adapters of two clients with NumPy alone: torch is never imported.

python examples/numpy_only.py
"""

import numpy as np

import fedlora_kernels.numpy as flk_numpy

M, N = 64, 48
RANKS, WEIGHTS, SCALINGS = (8, 4), (0.7, 0.3), (2.0, 1.0)

# Each client's factors of one layer: B [m, r] and A [r, n].
draw = np.random.default_rng(0)
bs = [draw.standard_normal((M, rank)).astype(np.float32) for rank in RANKS]
as_ = [draw.standard_normal((rank, N)).astype(np.float32) for rank in RANKS]
# Weight times scaling, once for each rank of a client: one row per layer.
terms = np.array(WEIGHTS) * np.array(SCALINGS)
scale = np.repeat(terms, RANKS)[None]

b_g, a_g, sigma, ranks = flk_numpy.stacked_svd_list(bs, as_, scale, energy=0.95)

rank = int(ranks[0])
b, a = b_g[0, :, :rank], a_g[0, :rank]
ideal = sum(term * (one @ other) for term, one, other in zip(terms, bs, as_, strict=True))
error = np.linalg.norm(b @ a - ideal) / np.linalg.norm(ideal)
print(f"rank {rank} of {sum(RANKS)}, relative error {error:.4f}")
