"""Products and decompositions of a batch have the bits of each matrix alone."""

import pytest
import torch
from assertions import assert_same_bits
from matrices import DEVICE

from fedlora_kernels.ops.product import decomposed, product

SIZES = [
    (1, 1, 1),
    (3, 3, 3),
    (7, 8, 9),
    (9, 9, 5),
    (11, 33, 3),
    (0, 4, 2),
    (5, 0, 3),
    (33, 17, 65),
]


def drawn(seed: int, rows: int, columns: int, turned: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, columns, rows) if turned else (5, rows, columns)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
    return x.mT if turned else x


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)], ids=str)
def test_a_product_does_not_depend_on_its_place(
    size: tuple[int, int, int], turned: tuple[bool, bool]
) -> None:
    m, k, n = size
    x, y = drawn(1, m, k, turned[0]), drawn(2, k, n, turned[1])
    whole = product(x, y)
    torch.testing.assert_close(whole, x @ y, rtol=1e-12, atol=1e-12)
    for place in range(5):
        assert_same_bits(product(x[place:], y[place:]), whole[place:])
        assert_same_bits(product(x[place].clone(), y[place].clone()), whole[place])
        assert_same_bits(product(x[place], y)[place], whole[place])
    assert_same_bits(
        product(x[:4].unflatten(0, (2, 2)), y[:4].unflatten(0, (2, 2)))[1, 0], whole[2]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 33])
def test_a_decomposition_does_not_depend_on_its_place(size: int) -> None:
    x = drawn(3, size, size, turned=False)
    symmetric = x + x.mT
    values, vectors = decomposed(torch.linalg.eigh, symmetric)
    again = product(vectors * values[:, None, :], vectors.mT)
    torch.testing.assert_close(again, symmetric, rtol=1e-12, atol=1e-11)
    for place in range(5):
        alone = decomposed(torch.linalg.eigh, symmetric[place:])
        assert_same_bits(alone[0], values[place:])
        assert_same_bits(alone[1], vectors[place:])
    assert decomposed(torch.linalg.svd, x.expand(2, 5, size, size))[1].shape == (2, 5, size)
