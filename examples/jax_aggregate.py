"""Aggregate the adapters of three clients in JAX, inside a compiled function, without torch.

    python examples/jax_aggregate.py

Needs the extra `jax`.
"""

import jax
import jax.numpy as jnp

from fedlora_kernels.interop import jax as flk_jax

LAYERS, M, N = 3, 64, 48
RANKS, WEIGHTS, SCALING = (8, 4, 2), (0.5, 0.3, 0.2), 2.0

# The clients' factors side by side: b [layers, m, R] and a [layers, R, n], with R = 8 + 4 + 2.
key_b, key_a = jax.random.split(jax.random.key(0))
b = jax.random.normal(key_b, (LAYERS, M, sum(RANKS)))
a = jax.random.normal(key_a, (LAYERS, sum(RANKS), N))
# Weight times scaling, once for each rank of a client.
terms = [weight * SCALING for weight in WEIGHTS]
scale = jnp.tile(jnp.repeat(jnp.array(terms), jnp.array(RANKS)), (LAYERS, 1))


@jax.jit
def florist(b, a, scale):
    """The combined factors, each layer's rank, and its relative error."""
    b_g, a_g, _, ranks = flk_jax.stacked_svd(b, a, scale, energy=0.9)
    ideal = (b * scale[:, None, :]) @ a
    error = jnp.linalg.norm(b_g @ a_g - ideal, axis=(1, 2)) / jnp.linalg.norm(ideal, axis=(1, 2))
    return b_g, a_g, ranks, error


b_g, a_g, ranks, errors = florist(b, a, scale)
for layer, (rank, error) in enumerate(zip(ranks, errors, strict=True)):
    print(f"layer {layer}: rank {rank} of {sum(RANKS)}, relative error {error:.4f}")
