"""stack: the clients' factors as batches of modules of one shape."""

import pytest
import torch
from federation import Drawn, draw, federation

import fedlora_kernels as flk
from fedlora_kernels.backends import lists
from fedlora_kernels.gram_space import batches as module_of_stack
from fedlora_kernels.gram_space.batches import stack


def shares(*weights: float) -> torch.Tensor:
    total = torch.tensor(weights, dtype=torch.float64)
    return total / total.sum()


def test_blocks_lie_side_by_side_in_the_clients_order() -> None:
    round_ = draw(ranks=({"a": 3, "b": 1}, 2), alphas=(3, 8), weights=(1, 3),
                  sizes={"a": (5, 7), "b": (4, 6)})  # fmt: skip
    batches = {batch.modules[0]: batch for batch in stack(round_.adapters, shares(1, 3))}
    assert batches.keys() == {"a", "b"}
    for module, batch in batches.items():
        bs, as_, scalings, weights = round_.of(module)
        assert torch.equal(batch.b[0], torch.cat(bs, dim=1))
        assert torch.equal(batch.a[0], torch.cat(as_, dim=0))
        assert batch.ranks == tuple(b.shape[1] for b in bs)
        expected = [
            w * s for w, s, b in zip(weights, scalings, bs, strict=True) for _ in range(b.shape[1])
        ]
        torch.testing.assert_close(
            batch.scale[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
        )


def test_a_homogeneous_federation_is_one_batch_for_each_size() -> None:
    sizes = {f"layers.{i}.{name}": size for i in range(4) for name, size in
             (("q", (6, 5)), ("v", (3, 5)), ("k", (3, 5)))}  # fmt: skip
    round_ = draw(sizes=sizes)
    batches = stack(round_.adapters, shares(1, 1, 1))
    assert sorted(len(batch.modules) for batch in batches) == [4, 8]
    found = [module for batch in batches for module in batch.modules]
    assert sorted(found) == sorted(sizes)
    for batch in batches:
        for index, module in enumerate(batch.modules):
            bs, as_, _, _ = round_.of(module)
            assert torch.equal(batch.b[index], torch.cat(bs, dim=1))
            assert torch.equal(batch.a[index], torch.cat(as_, dim=0))


@pytest.mark.parametrize(("fit", "expected"), [(0, [1] * 10), (4, [3, 3, 4]), (10, [10])])
def test_a_batch_ends_where_its_gram_matrices_would_outgrow_the_limit(
    fit: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least one module, else at most `fit`, and every module once, in order."""
    round_ = draw(sizes={f"layers.{i}.q": (6, 5) for i in range(10)}, ranks=(4, 2, 1))
    monkeypatch.setattr(module_of_stack, "GRAM_BYTES", fit * 7 * 7 * 8)
    batches = stack(round_.adapters, shares(1, 1, 1))
    assert [len(batch.modules) for batch in batches] == expected
    assert [module for batch in batches for module in batch.modules] == round_.modules
    for batch in batches:
        for index, module in enumerate(batch.modules):
            assert torch.equal(batch.b[index], torch.cat(round_.of(module)[0], dim=1))


@pytest.mark.parametrize("absent", ["zero", "renormalize"])
def test_absent_clients_are_left_out_and_weights_follow_the_option(absent: str) -> None:
    round_ = draw(absent={1: ["layers.0.down"]})
    for batch in stack(round_.adapters, shares(50, 20, 30), absent=absent):
        if batch.modules == ("layers.0.down",):
            assert batch.clients == (0, 2)
            assert batch.labels == ("client 0 (site-0)", "client 2 (site-2)")
            whole = 0.8 if absent == "renormalize" else 1.0
            expected = torch.tensor([0.5, 0.3], dtype=torch.float64) / whole
            torch.testing.assert_close(batch.weights, expected, rtol=1e-14, atol=0)
        else:
            assert batch.clients == (0, 1, 2)


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_are_widened_without_loss(
    dtypes: tuple[torch.dtype, torch.dtype], common: torch.dtype
) -> None:
    one = [draw(ranks=(4,), alphas=(4,), weights=(1,), dtype=dtype, seed=k).drawn[0]
           for k, dtype in enumerate(dtypes)]  # fmt: skip
    for batch in stack(federation(one).adapters, shares(1, 1)):
        assert (batch.b.dtype, batch.a.dtype) == (common, common)
        for index, module in enumerate(batch.modules):
            for k in range(2):
                block = slice(4 * k, 4 * k + 4)
                assert torch.equal(batch.b[index][:, block].double(), one[k][module].b.double())
                assert torch.equal(batch.a[index][block].double(), one[k][module].a.double())


@pytest.mark.parametrize("side", ["b", "a"])
def test_a_size_that_differs_names_both_clients_and_the_module(side: str) -> None:
    round_ = draw()
    module = "layers.0.down"
    old = round_.drawn[2][module]
    b = old.b[:1] if side == "b" else old.b
    a = old.a[:, :1] if side == "a" else old.a
    drawn = [*round_.drawn[:2], {**round_.drawn[2], module: Drawn(b, a, old.scaling)}]
    words = r"client 2 \(site-2\), module layers.0.down.*expected 13 x 40.*client 0 \(site-0\)"
    with pytest.raises(flk.AdapterError, match=words):
        stack(federation(drawn).adapters, shares(1, 1, 1))


def test_unknown_way_to_treat_absent_modules() -> None:
    with pytest.raises(ValueError, match=r"absent.*'skip'"):
        stack(draw().adapters, shares(1, 1, 1), absent="skip")


@pytest.mark.parametrize(("stage", "pieces"), [(1, 6), (60, 4), (1 << 20, 3)])
def test_copies_travel_in_few_pieces(
    stage: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All values, those of one shape and dtype together; what is there already is itself."""
    monkeypatch.setattr(lists, "STAGE_BYTES", stage)
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, 5), (7, 1), (3, 5), (3, 5), (3, 5)]
    tensors = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    tensors[3] = tensors[3].mT.contiguous().mT  # not in the order of memory
    tensors += [torch.randn(3, 5, generator=generator).double(), torch.empty(0, 4).bfloat16()]
    there = torch.randn(4, 4, generator=generator)
    on_the_cpu = ([*tensors, there], torch.device("cpu"), torch.float32)
    copies = dict(lists.staged(*on_the_cpu))
    assert sorted(copies) == list(range(len(tensors)))
    moved = lists.moved(*on_the_cpu)
    assert moved[-1] is there
    for place, tensor in enumerate(tensors):
        for copy in (copies[place], moved[place]):
            assert torch.equal(copy, tensor.float())
            assert copy.is_contiguous()
    stored = {copy.untyped_storage().data_ptr() for copy in copies.values() if copy.numel()}
    assert len(stored) == pieces


def test_copies_are_made_once_for_a_batch_and_let_go_of_after_it() -> None:
    one = [draw(ranks=(4,), alphas=(4,), weights=(1,), dtype=dtype, seed=k).drawn[0]
           for k, dtype in enumerate((torch.bfloat16, torch.float32))]  # fmt: skip
    round_ = flk.Round(list(federation(one).adapters))
    for grams in round_.read():
        batch = grams.batch
        assert batch.list_b is batch.list_b
        assert batch.list_a is batch.list_a
        first = batch.first_a
        assert all(torch.equal(x, y) for x, y in zip(first, batch.list_a[::2], strict=True))
        shared = {x.untyped_storage().data_ptr() for x in batch.list_a}
        assert not shared & {x.untyped_storage().data_ptr() for x in first}
    assert all("list_b" not in grams.batch.__dict__ for grams in round_.grams)


def test_on_a_gpu_a_batch_grows_with_its_memory() -> None:
    assert module_of_stack.gram_bytes_on(torch.device("cpu")) == module_of_stack.GRAM_BYTES
    assert module_of_stack.share_of(16 << 30) == 256 << 20
    assert module_of_stack.share_of(80 << 30) == 1280 << 20
    assert module_of_stack.share_of(4 << 30) == module_of_stack.GRAM_BYTES
