"""The benchmarks themselves: peers and floors are right, wrong outputs get no number.

Times are never compared with anything here.
"""

import json
import math
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fedlora_kernels as flk
from benchmarks import figures, pages, peers
from benchmarks import run as program
from benchmarks.peers import (
    adam,
    dense_svd,
    flower,
    numpy_selection,
    peft_merge,
    product_eigenvalues,
    qr_core,
    svd_lowrank,
    three_svds,
    two_roots,
)
from benchmarks.stand import clients, correctness, inputs, memory, overhead, results, roofline
from benchmarks.stand.correctness import Check
from benchmarks.stand.device import Device
from benchmarks.stand.inputs import Round, Stacks
from benchmarks.stand.measure import Comparison, Run, Variant, ratio
from benchmarks.stand.peer import Peer, Prepared, variants
from benchmarks.stand.revision import Revision, RevisionError
from benchmarks.stand.roofline import Roofline, Work
from benchmarks.stand.shapes import FLORIST_RANKS, LAYERS, MODELS, Case, equal
from benchmarks.stand.suite import Setting
from benchmarks.stand.tasks import Averages, Mean, Spectrum, Surrogate, Truncation
from benchmarks.suites import (
    acceptance,
    aggregate,
    combine,
    flora_na,
    flows,
    gpu,
    gram,
    host,
    rank,
    robust,
    scale,
    scaling,
    short,
    spectrum,
    stacked_svd,
    surrogate,
    weighted_sum,
)
from fedlora_kernels import reference
from fedlora_kernels.ops.operator import Operator

CPU = Device.use("cpu", 2)
ROOF = Roofline(1e9, 1e9, 2e9)
PLAIN = Case("test", "module", equal(3, 4), modules=2, dtype=torch.float64, size=(37, 53))
MIXED = replace(PLAIN, ranks=(5, 3, 1))
WIDE = replace(PLAIN, ranks=equal(6, 8))
SINGLE = replace(PLAIN, dtype=torch.float32)
TIGHT = 1e-12
"""float64 peers against the float64 reference, relative to the update's norm."""


@pytest.fixture
def stacks(request: pytest.FixtureRequest) -> Stacks:
    return inputs.draw(getattr(request, "param", PLAIN))


def updates(stacks: Stacks, rule: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
    weights = stacks.weights.tolist()
    return torch.stack(
        [
            rule(
                stacks.client_b[index],
                stacks.client_a[index],
                stacks.scalings[index].tolist(),
                weights,
                **options,
            )
            for index in range(stacks.case.modules)
        ]
    )


def truncation(stacks: Stacks, energy: float, max_rank: int | None) -> Truncation:
    return Truncation(Round.of(stacks), energy, max_rank)


def assert_updates(pairs: list[correctness.Pair], expected: torch.Tensor, tolerance: float) -> None:
    found = torch.stack([b.double() @ a.double() for b, a in pairs])
    error = torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected)
    assert float(error.max()) <= tolerance


@pytest.mark.parametrize("stacks", [PLAIN, MIXED, WIDE], indirect=True, ids=str)
@pytest.mark.parametrize("energy", [0.5, 0.9])
@pytest.mark.parametrize("peer", [three_svds.three_svds, qr_core.qr_core, dense_svd.dense_svd])
def test_svd_peers_are_florist(
    stacks: Stacks, energy: float, peer: Callable[..., list[correctness.Pair]]
) -> None:
    expected = updates(stacks, reference.rules.florist, energy=energy, max_rank=6)
    assert_updates(peer(truncation(stacks, energy, 6)), expected, TIGHT)


@pytest.mark.parametrize("stacks", [PLAIN, MIXED], indirect=True, ids=str)
def test_svd_lowrank_is_near_the_truncation(stacks: Stacks) -> None:
    torch.manual_seed(0)
    task = truncation(stacks, 0.9, 6)
    pairs = svd_lowrank.svd_lowrank(task)
    assert {pair[1].shape[0] for pair in pairs} == {6}
    checks = correctness.near_optimal(stacks, pairs, svd_lowrank.EXCESS)
    assert all(check.passed for check in checks), checks


@pytest.mark.parametrize("case", [SINGLE, replace(MIXED, dtype=torch.float32)], ids=str)
def test_peft_peers(case: Case) -> None:
    stacks = inputs.draw(case)
    model = peft_merge.PeftModel(Round.of(stacks))
    dense = updates(stacks, reference.rules.ideal_update)
    eps = 8 * torch.finfo(torch.float32).eps
    for _ in range(2):  # a second merge under the same name is done again, not returned at once
        model.forget()
        merged = model.merge("svd", 4)
        assert merged[0][1].shape[0] == 4
        assert_updates(merged, torch.stack([reference.rules.truncate(x, 4) for x in dense]), eps)
    model.forget()
    stacked = model.merge("cat")
    assert stacked[0][1].shape[0] == case.stacked_rank
    assert_updates(stacked, dense, eps)


@pytest.mark.parametrize("stacks", [SINGLE], indirect=True, ids=str)
def test_numpy_average_is_the_weighted_sum(stacks: Stacks) -> None:
    arrays = [[stacks.client_a[module][k].numpy() for module in range(2)] for k in range(3)]
    found = flower.average(arrays, [8.0, 6.0, 4.0])
    stacked = stacks.a.unflatten(1, (3, -1))
    expected = reference.weighted_sum(stacked, torch.tensor([8.0, 6.0, 4.0]) / 18)
    torch.testing.assert_close(
        torch.stack([torch.from_numpy(x) for x in found]), expected, rtol=1e-6, atol=1e-7
    )


def test_numpy_selection_is_the_references() -> None:
    sigma = inputs.spectra(replace(PLAIN, modules=40))
    expected = reference.select_rank(sigma, sigma.square().sum(-1), 0.9, 8)
    assert numpy_selection.ranks(sigma.numpy(), 0.9, 8) == expected.tolist()


def test_spectrum_peers(stacks: Stacks) -> None:
    task = Spectrum(stacks)
    expected = reference.spectrum(*task.grams, stacks.scale)[0]
    scale = float(expected.max()) ** 2
    roots = torch.stack([sigma for _, sigma in two_roots.two_roots(task)])
    squares = torch.stack(product_eigenvalues.product_eigenvalues(task))
    assert float((roots.square() - expected.square()).abs().max()) <= 1e-13 * scale
    assert float((squares - expected.square()).abs().max()) <= 1e-12 * scale


def test_adam_minimises_flora_nas_objective() -> None:
    stacks = inputs.draw(replace(PLAIN, family="unbalanced"))
    grams = reference.gram(stacks.b, False), reference.gram(stacks.a, True)
    objective = reference.surrogate(*grams, stacks.weights, stacks.scalings)[2]
    task = Surrogate(stacks, steps=60)
    start = task.fedit
    torch.testing.assert_close(start, objective[:, 0] / stacks.total_energy, rtol=1e-9, atol=0)
    reached = task.shortfall(*adam.adam(task, 1e-2))
    assert bool((reached < start).all())
    assert bool((reached >= objective[:, -1] / stacks.total_energy * (1 - 1e-9)).all())


@pytest.mark.parametrize("stacks", [PLAIN, MIXED, WIDE], indirect=True, ids=str)
def test_reference_values_are_those_of_the_dense_update(stacks: Stacks) -> None:
    dense = torch.stack([stacks.update(index) for index in range(stacks.case.modules)])
    assert_updates(list(zip(stacks.b * stacks.scale[:, None], stacks.a, strict=True)), dense, TIGHT)
    expected = torch.linalg.svdvals(dense)
    error = (stacks.sigma - expected[:, : stacks.sigma.shape[1]]).abs().max()
    assert float(error) <= TIGHT * float(expected.max())
    pairs = qr_core.qr_core(truncation(stacks, 0.5, None))
    gaps = torch.stack([x - b @ a for x, (b, a) in zip(dense, pairs, strict=True)])
    torch.testing.assert_close(
        correctness.distances(stacks, pairs), torch.linalg.matrix_norm(gaps), rtol=1e-9, atol=0
    )


def test_families_keep_the_ranks_they_promise() -> None:
    few = inputs.draw(Case("test", "x", equal(8, 16), modules=1, size=(512, 512)))
    many = inputs.draw(replace(few.case, family="drifted"))
    assert 4 <= int(correctness.expected_ranks(few, 0.9, None)) <= 7
    assert int(correctness.expected_ranks(many, 0.9, None)) >= 128 // 4
    assert torch.equal(few.b, inputs.draw(few.case).b)


def comparisons() -> dict[str, Callable[[], Comparison]]:
    narrow = inputs.draw(replace(SINGLE, size=(64, 96)))
    mixed = inputs.draw(replace(SINGLE, ranks=(5, 3, 1)))
    bf16 = inputs.draw(replace(SINGLE, dtype=torch.bfloat16))
    fixed_a = inputs.draw(replace(narrow.case, family=flows.FIXED_A))
    everything = (*stacked_svd.ON_FACTORS, *stacked_svd.ON_UPDATES, *stacked_svd.MERGED)
    made: dict[str, Callable[[], Comparison]] = {
        "gram": lambda: gram.compare(narrow),
        "gram bf16": lambda: gram.compare(bf16),
        "spectrum": lambda: spectrum.compare(narrow),
        "rank": lambda: rank.compare(PLAIN, CPU),
        "combine": lambda: combine.compare(mixed),
        "weighted_sum": lambda: weighted_sum.compare(narrow),
        "surrogate": lambda: surrogate.compare(narrow, steps=30),
        "stacked_svd": lambda: stacked_svd.compare(narrow, everything, max_rank=8, cat=True),
        "stacked_svd mixed": lambda: stacked_svd.compare(mixed, max_rank=8),
        "flora_na": lambda: flora_na.compare(narrow),
        "flora_na bf16": lambda: flora_na.compare(bf16),
    }
    for rule, case in {rule: case for case, rule in aggregate.CASES}.items():
        drawn = narrow if case.family == narrow.case.family else fixed_a
        made[f"aggregate {rule}"] = lambda rule=rule, drawn=drawn: aggregate.compare(
            Round.of(drawn), rule, aggregate.PEERS.get(rule, ()), "aggregate"
        )
    whole = Case("all-MiniLM-L6-v2", "query", equal(3, 4), modules=2, beside=("value",))
    for rule in flows.PEERS:
        family = flows.FIXED_A if rule == "ffa" else whole.family
        made[f"flows {rule}"] = lambda rule=rule, family=family: aggregate.compare(
            Round.draw(replace(whole, family=family)), rule, flows.PEERS[rule], "flows"
        )
    made["flows one kind"] = lambda: aggregate.compare(
        Round.of(fixed_a), "ffa", flows.PEERS["ffa"], "flows"
    )
    return made


COMPARISONS = comparisons()


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_variant_is_right_and_gets_a_number(name: str) -> None:
    torch.manual_seed(0)
    rows = Run(COMPARISONS[name](), CPU, ROOF, rounds=1).measured()
    assert {row.variant: row.refused for row in rows if row.refused} == {}
    assert rows[0].source == ""
    for row in rows:
        assert row.seconds is not None
        assert row.checks, row.variant


def test_flows_are_said_beside_their_targets_and_shown_on_the_page() -> None:
    rows = []
    for case in flows.CASES:
        small = replace(case, modules=1, ranks=equal(2, 3))
        task = Averages(Round.draw(small))
        for rule, share in (("fedit", 2.0), ("ffa", 0.5)):
            family = flows.FIXED_A if rule == "ffa" else case.family
            theirs = replace(flower.PEER.variant(task), timed=lambda: (0.1, None))
            theirs = replace(theirs, checks=lambda _: [])
            seconds = 0.1 * share
            ours = Variant(
                f"aggregate {rule}",
                lambda: None,
                lambda _: [],
                task.work,
                timed=lambda seconds=seconds: (seconds, None),
            )
            compared = Comparison("flows", replace(case, family=family), (ours, theirs), rule)
            rows += Run(compared, CPU, ROOF, rounds=1).measured()
    said = list(flows.ratios(rows))
    assert len(said) == 6
    assert said[0].endswith("200 ms,  2.00 of numpy average's 100 ms (target 1.30)")
    assert said[1].endswith("50 ms,  0.50 of numpy average's 100 ms (target 0.80)")
    assert said[5].endswith("(target 1.50)")
    document = results.of_rows("flows", CPU, ROOF, rows)
    tables = pages.tables({"flows": document}, [])
    assert "TinyLlama-1.1B: 44 modules, 8 x 16" in tables
    assert "| `fedit` | numpy average | 200 ms; 0.50 | 200 ms; 0.50 |" in tables
    assert "0.50 to 0.50 times" in pages.claims({"flows": document})


PEER_FILES = sorted(
    path.stem
    for path in Path(peers.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "cut")
)


@pytest.mark.parametrize("name", PEER_FILES)
def test_a_peer_is_one_object_that_a_suite_names(name: str) -> None:
    module = import_module(f"benchmarks.peers.{name}")
    objects = {key for key, value in vars(module).items() if isinstance(value, Peer)}
    assert objects
    folder = Path(program.__file__).parent / "suites"
    named = {
        found
        for path in folder.glob("*.py")
        for found in re.findall(rf"\b{name}\.([A-Z][A-Z_0-9]*)", path.read_text(encoding="utf-8"))
    }
    assert objects <= named | {"PEER", "CAT"}
    assert objects & named


def test_a_new_peer_gets_a_row_if_its_check_passes() -> None:
    task = Mean(inputs.draw(SINGLE))

    def peer(name: str, factor: float) -> Peer[Mean]:
        return Peer(
            name,
            "a test",
            lambda task: Prepared(
                lambda: factor * reference.weighted_sum(task.stacked, task.stacks.weights),
                note="prepared",
            ),
            Mean.checks,
            answers=lambda task: name != "elsewhere",
        )

    named = [peer("right", 1.0), peer("wrong", 1.001), peer("elsewhere", 1.0)]
    compared = weighted_sum.compare(task.stacks)
    others = (*compared.variants, *variants(task, named))
    rows = Run(replace(compared, variants=others), CPU, ROOF, rounds=1).measured()
    right, wrong = rows[-2:]
    assert (right.variant, right.source, right.note, right.refused) == (
        "right",
        "a test",
        "prepared",
        "",
    )
    assert right.seconds is not None
    assert (wrong.variant, wrong.seconds) == ("wrong", None)
    assert "error / norm is 1.00e-03" in wrong.refused


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's Python files that says another version, as if it had been built."""

    def copied(_: Revision, folder: Path) -> Path:
        installed = folder / "installed"
        package = Path(flk.__file__).parent
        shutil.copytree(
            package,
            installed / "fedlora_kernels",
            ignore=lambda _, names: {
                name for name in names if name.endswith(".so") or name == "__pycache__"
            },
        )
        return installed

    monkeypatch.setattr(Revision, "_built", copied)
    return Path(flk.__file__)


TINY_GPU = next(iter(gpu.SUITE.tiny(CPU)))


@pytest.mark.usefixtures("another")
def test_another_revision_is_measured_in_a_process_of_its_own() -> None:
    with Revision("HEAD~1", CPU, tiny=True) as base:
        assert base._folder is not None
        comparison = gpu.SUITE.tiny(CPU)[TINY_GPU](CPU)
        compared = base.added("gpu", TINY_GPU, comparison)
        names = [variant.name for variant in compared.variants]
        assert names[-2:] == ["exact at HEAD~1", "fast at HEAD~1"]
        rows = Run(compared, CPU, ROOF, rounds=2).measured()
        assert {row.variant: row.refused for row in rows if row.refused} == {}
        assert (rows[-2].source, len(rows[-2].samples)) == ("git HEAD~1", 2)
        assert rows[-2].checks == rows[0].checks
        assert rows[-2].times_first is not None
        with pytest.raises(RevisionError, match="KeyError"):
            base.added("gpu", "no such comparison", comparison).variants[-1].timed()
        folder = base._folder
    assert not folder.exists()


def test_a_revision_that_is_not_there() -> None:
    with pytest.raises(RevisionError, match="no-such-revision"), Revision("no-such-revision", CPU):
        pass


@pytest.mark.slow
def test_a_revision_is_built() -> None:
    with Revision("HEAD", CPU, tiny=True) as base:
        comparison = gpu.SUITE.tiny(CPU)[TINY_GPU](CPU)
        rows = Run(base.added("gpu", TINY_GPU, comparison), CPU, ROOF, rounds=1).measured()
    assert [row.refused for row in rows] == [""] * len(rows)
    assert rows[-1].variant == "fast at HEAD"


def test_numbers_of_a_row() -> None:
    """On a clock that says 2 s for ours and 4, 12 and 5 s for a peer's rounds."""
    before = [0.5, 0.5]  # the call that is checked, and one that says how long a call takes
    clocks = {"ours": iter([*before, 2.0, 2.0, 2.0]), "peer": iter([*before, 4.0, 12.0, 5.0])}

    def told(name: str, work: Work) -> Variant:
        checks = [Check("error", 0.0, 1e-6)]
        source = "" if name == "ours" else name
        return Variant(
            name,
            lambda: None,
            lambda _: checks,
            work,
            source,
            timed=lambda: (next(clocks[name]), None),
        )

    # Floors on ROOF: 1 s by its bytes, and 1.5 s by its operations.
    variants = (told("ours", Work(1e9)), told("peer", Work(1e8, flops_64=1e9, flops_32=1e9)))
    ours, peer = Run(Comparison("gram", PLAIN, variants), CPU, ROOF, rounds=3).measured()
    assert (ours.seconds, ours.times_first, ours.floor_seconds) == (2.0, 1.0, 1.0)
    assert (ours.share_of_floor, ours.gbytes_per_second, ours.gflops) == (0.5, 0.5, 0.0)
    assert (peer.seconds, peer.times_first, peer.floor_seconds) == (5.0, 2.5, 1.5)
    assert (peer.share_of_floor, peer.gflops) == (0.3, 0.4)


def variant(name: str, error: float) -> Variant:
    return Variant(name, lambda: None, lambda _: [Check("error", error, 1e-6)], Work(1e3), name)


@pytest.mark.parametrize("error", [2e-6, math.nan, math.inf])
def test_a_red_check_refuses_the_number(error: float) -> None:
    wrong = Comparison("gram", PLAIN, (variant("right", 0.0), variant("wrong", error)))
    right, refused = Run(wrong, CPU, ROOF, rounds=3).measured()
    assert right.seconds is not None
    assert (refused.seconds, refused.samples, refused.times_first) == (None, (), None)
    assert (refused.share_of_floor, refused.gflops) == (None, None)
    assert "error is" in refused.refused
    assert "allowed 1e-06" in refused.refused


def test_nothing_is_related_to_a_refused_first_variant() -> None:
    wrong = Comparison("gram", PLAIN, (variant("wrong", 1.0), variant("right", 0.0)))
    refused, right = Run(wrong, CPU, ROOF, rounds=3).measured()
    assert refused.seconds is None
    assert right.seconds is not None
    assert right.times_first is None


def test_wrong_factors_are_red() -> None:
    stacks = inputs.draw(SINGLE)
    pairs = three_svds.three_svds(truncation(stacks, 0.9, None))
    good = correctness.near_optimal(stacks, pairs)
    (b, a), rest = pairs[0], pairs[1:]
    bad = correctness.near_optimal(stacks, [(b * (1 + 1e-2), a), *rest])
    ranks = [a.shape[0] for _, a in pairs]
    assert good[0].passed
    assert not bad[0].passed
    assert correctness.same_ranks(stacks, ranks, 0.9, None)[0].passed
    ranks[0] += 1
    assert not correctness.same_ranks(stacks, ranks, 0.9, None)[0].passed


def test_the_floor_is_the_slower_of_moving_and_computing() -> None:
    assert Work(3e9).floor(ROOF) == 3
    assert Work(1e9, flops_64=2e9, flops_32=2e9).floor(ROOF) == 3
    assert (Work(1, 2, 3) + Work(10, 20, 30)) == Work(11, 22, 33)


def test_counts_of_work() -> None:
    b, a = torch.zeros(2, 37, 12), torch.zeros(2, 12, 53)
    moved = 4 * 2 * 37 * 12 + 8 * 2 * 12 * 12
    flops = 2 * 12 * 13 * 37
    assert roofline.gram(b, False) == Work(moved, flops_64=flops)
    assert roofline.gram(b, False, "fast") == Work(moved, flops_32=flops)
    assert roofline.gram(b.double(), False, "fast").flops_64 == flops
    assert roofline.combine(b, a, 6, 4) == Work(
        4 * 2 * 90 * 12 + 4 * 2 * 4 * 90, flops_32=2 * 12 * 90 * 6
    )
    assert roofline.weighted_sum(torch.zeros(2, 3, 5)) == Work(4 * (30 + 10))
    one_pass = roofline.stacked_svd(b, a, 6, 4)
    assert one_pass.bytes == roofline.combine(b, a, 6, 4).bytes
    grams = roofline.gram(b, False).flops + roofline.gram(a, True).flops
    assert one_pass.flops_64 == grams + roofline.spectrum(2, 12, 3).flops_64
    beyond = roofline.stacked_svd(torch.zeros(1, 37, 64), torch.zeros(1, 64, 53), 6, 4)
    dense = 2 * 37 * 53 * 64 + 37 * 37 * 53
    assert beyond.flops_64 == dense + roofline.spectrum(1, 37, 6).flops_64


def test_ratios_are_medians_of_rounds() -> None:
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0
    assert ratio([8.0], [1.0, 2.0, 4.0]) == 4.0
    assert ratio([], [1.0]) is None


def test_the_roofline_is_measured() -> None:
    measured = Roofline.measure(CPU, 1 << 12, 32)
    assert measured.copy_bytes_per_second > 0
    assert measured.fp64_flops_per_second > 0
    assert measured.fp32_flops_per_second > 0


def test_result_files(tmp_path: Path) -> None:
    rows = Run(gram.compare(inputs.draw(SINGLE)), CPU, ROOF, rounds=2).measured()
    path = results.write(tmp_path, CPU, results.of_rows("gram", CPU, ROOF, rows))
    assert path == tmp_path / CPU.folder / "gram.json"
    assert CPU.folder.endswith("-2-threads")
    text = path.read_text(encoding="utf-8")
    assert socket.gethostname() not in text.split('"')
    assert str(Path.home()) not in text
    found = results.read(path.parent)["gram"]
    assert {"schema", "date", "backend", "device", "versions", "roofline", "rows"} <= found.keys()
    assert {"python", "torch", "fedlora_kernels"} <= found["versions"].keys()
    row = found["rows"][0]
    assert (row["m"], row["n"], row["stacked_rank"], row["ranks"]) == (37, 53, 12, "3 x 4")
    assert len(row["samples"]) == 2
    path.write_text(json.dumps({**found, "schema": 0}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"gram.json has schema 0, expected 1"):
        results.read(path.parent)


def test_shapes() -> None:
    assert MODELS.keys() == LAYERS.keys()
    grouped = Case("Llama-3-8B", "v_proj", FLORIST_RANKS, modules=2)
    assert (grouped.m, grouped.n, grouped.stacked_rank) == (1024, 4096, 152)
    assert str(grouped) == "Llama-3-8B v_proj 2 x 1024x4096, 64,32,16,16,8,8,4,4, fp32"


def test_the_short_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = tuple((name, SINGLE, compare) for name, _, compare in short.COMPARISONS[1:])
    monkeypatch.setattr(short, "COMPARISONS", small)
    monkeypatch.setattr(Roofline, "measure", lambda *_, **__: ROOF)
    monkeypatch.setattr("benchmarks.stand.measure.ROUNDS", (1, 1))
    console = Console(width=80, record=True)
    arguments = ["--suite", "short", "--threads", "2", "--results", str(tmp_path)]
    assert program.main(arguments, console) == 0
    text = console.export_text()
    for shown in ("three SVDs", "PEFT svd", "numpy average", "of floor", "bmm in float64"):
        assert shown in text
    assert results.read(tmp_path / CPU.folder)["short"]["rows"]


def test_peak_memory_in_a_process_of_its_own() -> None:
    case = Case("test", "x", equal(8, 16), modules=1, size=(1024, 1024))
    measured = memory.peak("three SVDs", case, 1)
    assert measured is not None
    assert measured.inputs == 2 * 1024 * 128 * 4
    # U_B, V_A and their products exist at once; LAPACK's workspace is not ten times that.
    assert 1.5 * measured.inputs <= measured.peak <= 20 * measured.inputs


def test_operators_are_timed_once_and_put_back() -> None:
    clients = aggregate.adapters(Round.of(inputs.draw(SINGLE)))
    before = Operator.__call__
    with overhead.operators_timed() as watch:
        flk.aggregate(clients, rule="florist")
    assert Operator.__call__ is before
    assert watch.seconds > 0
    assert sum(watch.calls.get(name, 0) for name in ("gram", "gram_list")) == 2
    with overhead.operators_timed() as watch:
        flk.ops.gram_list([torch.ones(4, 2), torch.ones(4, 2)], 1, False)
    assert watch.calls == {"gram_list": 1}


def test_host_times_are_of_calls_without_work() -> None:
    found = host.measure(Setting(CPU, ROOF, True, Console(quiet=True)))
    assert found["failed"] is False
    assert [row["operator"] for row in found["operators"]] == list(host.calls(1))
    for row in found["operators"]:
        assert 0 < row["cpu_seconds"] < 0.1
        assert len(row["samples"]) == 3
    for row in found["rounds"]:
        assert 0 < row["operators"] < row["cpu_seconds"] + sum(row["samples"])


def test_acceptance_and_figures(tmp_path: Path) -> None:
    found = acceptance.measure(Setting(CPU, ROOF, True, Console(quiet=True)))
    assert found.pop("failed") is False
    assert [row["refused"] for row in found["rows"]] == [""] * len(found["rows"])
    summary = found["summary"]
    assert len(summary["stacked_svd"]) == 4
    for case in summary["stacked_svd"]:
        for precision in ("exact", "fast"):
            assert set(case["times_as_long_as"][precision]) == {"three SVDs", "QR + QR + core SVD"}
    assert summary["flora_na"]["solve_over_gram"] > 0
    assert {entry["dtype"] for entry in summary["folders"]} == {"fp32", "bf16"}
    assert all(entry["outside_over_files"] > 0 for entry in summary["folders"])

    path = results.write(tmp_path, CPU, results.document("acceptance", CPU, ROOF, found))
    rows = Run(gram.compare(inputs.draw(SINGLE)), CPU, ROOF, rounds=1).measured()
    results.write(tmp_path, CPU, results.of_rows("gram", CPU, ROOF, rows))
    drawn = figures.drawn(path.parent, "svg")
    assert [figure.name for figure in drawn] == ["speedups.svg", "floors.svg"]
    marks = (
        "<!-- benchmark claims -->\nstale\n<!-- end -->\n<!-- benchmark tables -->\n<!-- end -->"
    )
    page = pages.filled(f"top\n{marks}\nend", tmp_path, "a")
    assert page.startswith("top")
    assert page.endswith("end")
    assert "of floor" in page
    assert f"![speedups](a/{path.parent.name}/figures/speedups.svg)" in page
    assert "three SVDs of FLoRIST's released code" in page
    assert "stale" not in page
    with pytest.raises(ValueError, match="has no mark"):
        pages.filled("no marks", tmp_path, "a")
    with pytest.raises(ValueError, match="unknown part 'more'"):
        pages.filled("<!-- benchmark more -->\n<!-- end -->", tmp_path, "a")


def test_clients_on_disk_are_those_of_the_stacks(tmp_path: Path) -> None:
    case = replace(SINGLE, dtype=torch.bfloat16)
    stacks = inputs.draw(case)
    folders = clients.write(tmp_path, case)
    adapters = [flk.Adapter.load(folder) for folder in folders]
    assert clients.folder_bytes(case) == stacks.nbytes == sum(x.bytes for x in adapters)
    for layer in range(case.modules):
        for k, adapter in enumerate(adapters):
            pair = adapter.factors[clients.module_name(layer)]
            assert pair.scaling == float(stacks.scalings[layer, k])
            assert torch.equal(pair.b, stacks.client_b[layer][k])
            assert torch.equal(pair.a, stacks.client_a[layer][k])


EMPTY_SCALE = "<!-- benchmark scale -->\n<!-- end -->"


def test_scale(tmp_path: Path) -> None:
    found = scale.measure(Setting(CPU, ROOF, True, Console(quiet=True)))
    assert found.pop("failed") is False
    many = found["many"]["rows"]
    assert found["many"]["stacked_rank"] == 640
    assert [row["rule"] for row in many] == ["fedit", "florist", "flexlora"]
    assert all(row["peak_bytes"] > 0 and row["share_of_floor"] > 0 for row in many)
    assert {row["rule"] for row in found["arrivals"]["rows"]} == {"fedit", "florist"}
    assert found["report"]["report_seconds"] > 0
    assert [curve["axis"] for curve in found["growth"]] == ["clients", "rank", "modules"]
    points = found["processes"]["points"]
    counts = [(point["rule"], point["processes"]) for point in points]
    assert counts[:2] == [("fedit", 1), ("fedit", 2)]
    assert all(point["seconds"] > 0 for point in points)
    results.write(tmp_path, CPU, results.document("scale", CPU, ROOF, found))
    page = pages.filled(EMPTY_SCALE, tmp_path, "a")
    assert "40 clients, Llama-2-7B q_proj 2 x 48x40, 40 x 16, bf16: 225 kB of files" in page
    assert page.count("| `fedit` | 1 | 25,000 | 225 kB |") == 1
    assert page.count("| `fedit` | 4 | 1 |") == 1
    assert page.count("| `florist` | 2 | 1 | ") == 1
    one = scale.measure(Setting(CPU, ROOF, True, Console(quiet=True), ["report"]))
    assert one.pop("failed") is False
    results.write(tmp_path, CPU, results.document("scale", CPU, ROOF, one))
    page = pages.filled(EMPTY_SCALE, tmp_path, "a")
    assert "FedIT's report" in page
    assert "several processes" not in page


def test_robust_weights_have_a_table(tmp_path: Path) -> None:
    stacks = inputs.draw(robust.TINY[0])
    rows = Run(robust.compare(stacks), CPU, ROOF, rounds=1).measured()
    results.write(tmp_path, CPU, results.of_rows("robust", CPU, ROOF, rows))
    page = pages.filled("<!-- benchmark robust -->\n<!-- end -->", tmp_path, "a")
    case = stacks.case
    assert f"{case.modules} modules, {case.m} x {case.n}, 4 x 4, fp32" in page
    shares = re.findall(r"\| `?([\w ]+)`? \| [\d.]+ [mu]?s \(([\d.]+)%\) \|", page)
    assert [name for name, _ in shares] == ["inner products", *flk.robust.names()]
    gram, *others = (row.seconds for row in rows)
    told = [float(share) for _, share in shares]
    assert told == pytest.approx([100 * other / gram for other in others], abs=0.06)


def test_an_optimum_that_is_missed_is_seen(tmp_path: Path) -> None:
    folders = clients.write(tmp_path, scale.TINY)
    round_ = flk.Round([flk.Adapter.load(folder) for folder in folders])
    for rule, best in (("flexlora", True), ("fedit", False)):
        round_.aggregate(rule, dtype=torch.float32).adapter.save(tmp_path / rule)
        gap = scale.above_optimum(folders, tmp_path / rule, 1)
        assert (abs(gap) <= scale.TOLERANCE) == best


def test_growth(tmp_path: Path) -> None:
    assert scaling.slope([(2.0, 3 * 2.0**2.5), (4.0, 3 * 4.0**2.5), (8.0, 3 * 8.0**2.5)]) == (
        pytest.approx(2.5)
    )
    points = [
        {"stacked_rank": rank, "seconds": {"gram": rank**2 * 100.0, "spectrum": float(rank**3)}}
        for rank in (16, 64, 256)
    ]
    assert scaling.crossing(points, "gram", "spectrum") == pytest.approx(100)
    curve = scaling.shrunk(scaling.curves()[0])
    found = scaling.walk(curve, CPU, ROOF)
    assert [point["x"] for point in found["points"]] == [2, 4, 8]
    assert [point["refused"] for point in found["points"]] == [{}] * 3
    assert {"stacked_svd", "gram", "spectrum", "three SVDs"} <= found["exponents"].keys()
    document = results.document("scaling", CPU, ROOF, {"curves": [found]})
    path = results.write(tmp_path, CPU, document)
    assert [figure.name for figure in figures.drawn(path.parent, "svg")] == ["growth.svg"]
