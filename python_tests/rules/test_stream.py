"""Stream: the same result as aggregate, durable at every moment, bounded in what is held."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from anonymous import peak
from attacks import attacked
from federation import (
    CASES,
    EPS,
    EQUAL_RANK_CASES,
    Drawn,
    Federation,
    draw,
    federation,
    norm,
    update,
    write_client,
)
from vera import vera_clients

import fedlora_kernels as flk
from fedlora_kernels.adapters import folder as folders

RULES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in flk.rules.names()),
    ("hetlora", {"norm_weighted": False}),
    ("florist", {"energy": 1.0}),
    ("florist", {"rank_budget": 9}),
    ("fedex", {"residual_rank": 2}),
    ("lora_a2", {"budget": 2}),
]
IDS = [f"{name}-{options}" for name, options in RULES]
WIDE = {"layers.0.q": (24, 16), "layers.1.q": (24, 16)}


def cases(rule: str) -> dict[str, dict[str, Any]]:
    chosen = CASES if flk.rules.find(rule).heterogeneous else EQUAL_RANK_CASES
    return {
        name: {**case, "common_a": flk.rules.find(rule).trains != "both"}
        for name, case in chosen.items()
    }


def streamed(
    state: Path, drawn: Federation, rule: str, order: list[int] | None = None, **options: Any
) -> flk.Stream:
    stream = flk.Stream(rule, state=state, **options)
    for k in order or range(len(drawn.adapters)):
        stream.add(drawn.adapters[k], drawn.weights[k], client=k)
    return stream


def assert_same(found: flk.Aggregation, expected: flk.Aggregation, drawn: Federation) -> None:
    assert found.adapter.factors.keys() == expected.adapter.factors.keys()
    assert (found.residual is None) == (expected.residual is None)
    for module, pair in expected.adapter.factors.items():
        other = found.adapter.factors[module]
        assert other.layout == pair.layout, module
        assert (other.scaling, other.kind) == (pair.scaling, pair.kind)
        size = drawn.spread(module)
        bound = 16 * EPS[pair.b.dtype] * size
        parts = [(found.adapter, expected.adapter)]
        if found.residual is not None and expected.residual is not None:
            parts.append((found.residual, expected.residual))
        gap = sum(update(one, module) - update(two, module) for one, two in parts)
        assert isinstance(gap, torch.Tensor)
        assert norm(gap) <= bound, f"{module}: {norm(gap)} > {bound}"
    assert found.adapter.config == expected.adapter.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rule", "options"), RULES, ids=IDS)
def test_the_result_is_that_of_aggregate(
    rule: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    for name, case in cases(rule).items():
        drawn = draw(**case, dtype=dtype)
        if rule == "florist" and "energy" not in options and name in ("all_zero_round",):
            options = {}
        expected = drawn.aggregate(rule, **options)
        stream = streamed(tmp_path / name, drawn, rule, **options)
        assert_same(stream.result(), expected, drawn)


@pytest.mark.parametrize(("rule", "options"), RULES, ids=IDS)
def test_the_order_changes_rounding_only(
    rule: str, options: dict[str, Any], tmp_path: Path
) -> None:
    case = {"common_a": flk.rules.find(rule).trains != "both", "alphas": (8, 8, 8)}
    drawn = draw(**case)
    expected = drawn.aggregate(rule, **options)
    stream = streamed(tmp_path / "s", drawn, rule, [2, 0, 1], **options)
    for module in drawn.modules:
        found = stream.result()
        gap = update(found.adapter, module) - update(expected.adapter, module)
        assert norm(gap) <= 64 * EPS[torch.float32] * drawn.spread(module)


@pytest.mark.parametrize("rule", ["fedit", "flexlora"])
@pytest.mark.parametrize("absent", ["zero", "renormalize"])
def test_a_result_in_between_is_of_those_that_came(rule: str, absent: str, tmp_path: Path) -> None:
    drawn = draw(absent={0: ["layers.0.down"]})
    stream = flk.Stream(rule, state=tmp_path / "s", absent=absent)
    for k, adapter in enumerate(drawn.adapters):
        stream.add(adapter, drawn.weights[k])
        some = Federation(drawn.drawn[: k + 1], drawn.adapters[: k + 1], drawn.weights[: k + 1])
        assert_same(stream.result(), some.aggregate(rule, absent=absent), some)
    assert len(stream) == len(drawn.adapters)


@pytest.mark.parametrize("robust", flk.robust.names())
def test_robust_weights_are_those_of_aggregate(robust: str, tmp_path: Path) -> None:
    found = attacked("scale by 100", 2)
    for rule in ("florist", "flora_na"):
        stream = streamed(tmp_path / rule, found.round_, rule, robust=robust)
        expected = found.round_.aggregate(rule, robust=robust)
        result = stream.result()
        assert_same(result, expected, found.round_)
        assert result.weighing.weights == pytest.approx(expected.weighing.weights, rel=1e-6)
        assert result.weighing.scales == pytest.approx(expected.weighing.scales, rel=1e-9)


def test_robust_weights_need_the_clients(tmp_path: Path) -> None:
    for rule in ("fedit", "ffa", "fedsa"):
        with pytest.raises(ValueError, match=f"a stream of rule '{rule}' keeps only sums"):
            flk.Stream(rule, state=tmp_path / "s", robust="krum")
    flk.Stream("florist", state=tmp_path / "s", robust="krum")
    with pytest.raises(ValueError, match=r"holds a stream of robust Krum\(attackers=None\)"):
        flk.Stream("florist", state=tmp_path / "s")


def test_heads_are_averaged(tmp_path: Path) -> None:
    drawn = draw()
    heads = [{"base_model.model.score.weight": torch.full((2, 3), float(k))} for k in range(3)]
    clients = federation(drawn.drawn, drawn.weights, extras=heads)
    for rule in ("fedit", "florist", "fedsa"):
        found = streamed(tmp_path / rule, clients, rule).result().adapter.extras
        expected = clients.aggregate(rule).adapter.extras
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("rule", ["fedit", "florist"])
def test_heads_that_stay_with_their_clients_may_differ(rule: str, tmp_path: Path) -> None:
    drawn = draw()
    heads = [{"base_model.model.score.weight": torch.ones(2 + k, 3)} for k in range(3)]
    clients = federation(drawn.drawn, drawn.weights, extras=heads)
    stream = streamed(tmp_path / "local", clients, rule, heads="local")
    result = stream.result()
    assert_same(result, clients.aggregate(rule, heads="local"), clients)
    assert not result.adapter.extras
    with pytest.raises(flk.AdapterError, match=r"client 1 \(1\), tensor .*score.* shape \[3, 3\]"):
        streamed(tmp_path / "average", clients, rule)
    with pytest.raises(ValueError, match="holds a stream of heads local, found average"):
        flk.Stream(rule, state=tmp_path / "local")
    with pytest.raises(ValueError, match="heads must be one of average, local, found 'mean'"):
        flk.Stream(rule, state=tmp_path / "mean", heads="mean")


@pytest.mark.parametrize("rule", ["fedit", "florist"])
@pytest.mark.parametrize("alike", [True, False])
def test_frozen_copies_stay_where_all_clients_have_the_same(
    rule: str, alike: bool, tmp_path: Path
) -> None:
    drawn = draw()
    key = "base_model.model.embed_tokens.base_layer.weight"
    copies = [{key: torch.full((2, 3), 0.1 if alike else float(k))} for k in range(3)]
    for lacking in (None, 0, 2):
        beside = [{} if k == lacking else copy for k, copy in enumerate(copies)]
        clients = federation(drawn.drawn, drawn.weights, extras=beside)
        found = streamed(tmp_path / f"s-{lacking}", clients, rule).result().adapter.extras
        expected = clients.aggregate(rule).adapter.extras
        assert found.keys() == expected.keys() == ({key} if alike and lacking is None else set())
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_vera_vectors_are_averaged(tmp_path: Path) -> None:
    clients = vera_clients()
    stream = flk.Stream("fedsa", state=tmp_path / "s")
    for client in clients:
        stream.add(client)
    found = stream.result().adapter.vera
    for module, (_, mean_d) in flk.aggregate(clients, rule="fedsa").adapter.vera.items():
        assert torch.allclose(found[module][1], mean_d)


def files(state: Path) -> dict[str, bytes]:
    return {str(p.relative_to(state)): p.read_bytes() for p in state.rglob("*") if p.is_file()}


@pytest.mark.parametrize("rule", ["fedit", "florist"])
def test_a_known_client_is_refused_and_changes_nothing(rule: str, tmp_path: Path) -> None:
    drawn = draw()
    first = write_client(tmp_path / "site-0", drawn.drawn[0])
    state = tmp_path / "s"
    stream = flk.Stream(rule, state=state)
    stream.add(first, 2)
    stream.add(drawn.adapters[1], client="b")
    before = files(state)
    again = flk.Stream(rule, state=state)
    for repeated in (stream, again):
        with pytest.raises(flk.AdapterError, match="in this stream already, as client 0"):
            repeated.add(tmp_path / "x" / ".." / "site-0")
        with pytest.raises(flk.AdapterError, match="client 'b' is in this stream already"):
            repeated.add(drawn.adapters[2], client="b")
        assert "b" in repeated
        assert first in repeated
        assert "c" not in repeated
    assert files(state) == before
    again.add(drawn.adapters[1])  # in memory without a name: a new one
    assert len(stream) == 3  # what another stream added is seen


@pytest.mark.parametrize("rule", ["fedit", "fedex"])
def test_a_stranger_is_refused_and_changes_nothing(rule: str, tmp_path: Path) -> None:
    drawn, other = draw(), draw(ranks=(5, 5, 5), seed=1)
    wide = draw(sizes={"layers.0.down": (9, 5)}, seed=1)
    state = tmp_path / "s"
    stream = streamed(state, drawn, rule)
    kept = torch.cat([pair.b.flatten() for pair in stream.result().adapter.factors.values()])
    for stranger, match in (
        (other.adapters[0], r"client 3 \(z\), module .*: rank 5, expected 4 as in the clients"),
        (wide.adapters[0], r"client 3 \(z\), module layers.0.down: the update is 9 x 5, expected"),
    ):
        with pytest.raises(flk.AdapterError, match=match):
            stream.add(stranger, client="z")
    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(flk.AdapterError, match="expected a finite number >= 0"):
            stream.add(drawn.adapters[0], weight)
    drawn.adapters[0].factors["layers.0.down"].b[0, 0] = torch.nan
    with pytest.raises(flk.AdapterError, match=r"client 3 .*layers.0.down: .*NaN"):
        stream.add(drawn.adapters[0])
    assert len(stream) == 3
    after = flk.Stream(rule, state=state).result().adapter.factors.values()
    assert torch.equal(kept, torch.cat([pair.b.flatten() for pair in after]))


@pytest.mark.parametrize("rule", ["fedit", "florist"])
def test_base_models_of_two_names(rule: str, tmp_path: Path) -> None:
    """The error's advice works, and gives what aggregate gives."""
    drawn = draw()
    adapters = []
    for own, name in zip(drawn.adapters, ("a/one", "b/two", "c/three"), strict=True):
        config = {**own.config, "base_model_name_or_path": name}
        adapters.append(flk.Adapter.from_state_dict(own.state_dict(), config))
    drawn = replace(drawn, adapters=tuple(adapters))
    with pytest.raises(flk.AdapterError, match=r"client 1 \(1\): .*same_base=True"):
        streamed(tmp_path / "refused", drawn, rule)
    stream = streamed(tmp_path / "s", drawn, rule, same_base=True)
    expected = drawn.aggregate(rule, same_base=True)
    assert_same(stream.result(), expected, drawn)


def test_another_a_is_refused_by_a_rule_with_one(tmp_path: Path) -> None:
    drawn = draw()
    stream = flk.Stream("ffa", state=tmp_path / "s")
    stream.add(drawn.adapters[0])
    with pytest.raises(flk.AdapterError, match=r"client 1 .*A differs from the clients before it"):
        stream.add(drawn.adapters[1])


def test_modules_may_share_one_tensor(tmp_path: Path) -> None:
    drawn = draw(sizes=WIDE).drawn[0]
    tied = federation([dict.fromkeys(WIDE, drawn["layers.0.q"])])
    for rule in flk.rules.names():
        assert_same(streamed(tmp_path / rule, tied, rule).result(), tied.aggregate(rule), tied)


def test_no_clients_and_no_weights(tmp_path: Path) -> None:
    for rule in ("fedit", "florist"):
        stream = flk.Stream(rule, state=tmp_path / rule)
        with pytest.raises(flk.AdapterError, match="no clients"):
            stream.result()
        stream.add(draw().adapters[0], 0)
        with pytest.raises(flk.AdapterError, match="all weights are zero"):
            stream.result()


def test_a_state_is_of_one_stream(tmp_path: Path) -> None:
    flk.Stream("florist", state=tmp_path / "s", energy=0.5)
    with pytest.raises(ValueError, match=r"holds a stream of rule FLoRIST\(energy=0.5"):
        flk.Stream("florist", state=tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no stream"):
        flk.Stream("fedit", state=tmp_path / "other")


def test_sums_report_no_errors_and_say_so(tmp_path: Path) -> None:
    result = streamed(tmp_path / "s", draw(), "fedit").result()
    assert all(row.rank == 4 and row.norm != row.norm for row in result.report.values())
    result.save(tmp_path / "out")
    assert "clients were not kept" in (tmp_path / "out" / "report.json").read_text()
    with pytest.raises(flk.AdapterError, match="keeps sums"):
        result.client_adapter(0)
    assert not list((tmp_path / "s").glob("clients/*"))
    assert len(list((tmp_path / "s").glob("sums.*"))) == 1


def test_a_folder_that_changed_is_refused_unless_copied(tmp_path: Path) -> None:
    drawn = draw()
    for copy in (False, True):
        folder = write_client(tmp_path / f"site-{copy}", drawn.drawn[0])
        stream = flk.Stream("florist", state=tmp_path / f"s-{copy}", copy=copy)
        stream.add(folder)
        expected = stream.result().adapter.factors["layers.0.down"].b.clone()
        with folders.replaced(folder, frozenset()) as made:
            drawn.adapters[1].write(made)
        if copy:
            found = flk.Stream("florist", state=tmp_path / "s-True").result()
            assert torch.equal(found.adapter.factors["layers.0.down"].b, expected)
            continue
        for each in (stream, flk.Stream("florist", state=tmp_path / "s-False")):
            with pytest.raises(flk.AdapterError, match=r"client 0 .*has changed since"):
                each.result()


# ---- kill -9 -----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, torch
import fedlora_kernels as flk
torch.set_num_threads(1)
rule, root, moments = sys.argv[1], sys.argv[2], [int(x) for x in sys.argv[3:]]

def adding(state, moment):
    count = 0
    def event(name, arguments=None):
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
    def audited(name, arguments):
        if name in {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}:
            event(name)
    flush = os.fsync
    os.fsync = lambda handle: (event("fsync"), flush(handle))[1]
    sys.addaudithook(audited)
    stream = flk.Stream(rule, state=state)
    for k in range(3):
        if str(k) not in stream:
            stream.add(f"{root}/site-{k}", k + 1, client=k)
            with open(f"{state}.told", "a") as told:
                told.write(f"{k}\\n")

for moment in moments:
    child = os.fork()
    if child == 0:
        try:
            adding(f"{root}/state-{moment}", moment)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("rule", ["fedit", "florist"])
def test_killed_at_any_step_a_stream_goes_on_to_the_same_bits(rule: str, tmp_path: Path) -> None:
    """Before each of the file operations of three clients in turn, or after the last."""
    drawn = draw()
    for k, client in enumerate(drawn.drawn):
        write_client(tmp_path / f"site-{k}", client)
    moments = range(1, 240, 4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", KILLED, rule, str(tmp_path), *map(str, moments)],
        check=True,
        env=environment,
    )
    whole = flk.Stream(rule, state=tmp_path / "whole")
    for k in range(3):
        whole.add(tmp_path / f"site-{k}", k + 1, client=k)
    expected = whole.result().adapter.state_dict()
    found = set()
    for moment in moments:
        state = tmp_path / f"state-{moment}"
        stream = flk.Stream(rule, state=state)
        told = Path(f"{state}.told")
        returned = told.read_text().split() if told.exists() else []
        assert len(stream) - len(returned) in (0, 1)
        assert all(k in stream for k in returned)
        found.add(len(stream))
        for k in range(len(stream), 3):
            stream.add(tmp_path / f"site-{k}", k + 1, client=k)
        tensors = stream.result().adapter.state_dict()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in tensors), moment
    assert found == {0, 1, 2, 3}


def test_a_line_cut_anywhere_counts_for_nothing(tmp_path: Path) -> None:
    drawn = draw()
    stream = streamed(tmp_path / "s", drawn, "florist", [0, 1])
    journal = tmp_path / "s" / "clients.jsonl"
    whole = journal.read_bytes()
    first = whole.index(b"\n") + 1
    expected = stream.result().adapter.state_dict()
    for cut in random.Random(0).sample(range(first, len(whole)), 8):
        journal.write_bytes(whole[:cut])
        again = flk.Stream("florist", state=tmp_path / "s")
        assert len(again) == 1
        again.add(drawn.adapters[1], drawn.weights[1], client=1)
        assert journal.read_bytes() == whole
        found = again.result().adapter.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


# ---- memory ------------------------------------------------------------------------------------


def test_more_modules_take_no_more_anonymous_memory(tmp_path: Path) -> None:
    """The peak of RssAnon while clients of 64 modules are added, beyond that of one module."""
    warm = """
rule, root, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
warm = flk.Stream(rule, state=root + "/warm-" + rule)
for k in range(3):
    warm.add(f"{root}/one-{k}")
"""
    code = """
stream = flk.Stream(rule, state=root + "/" + rule, memory_limit=limit)
for k in range(3):
    stream.add(f"{root}/site-{k}")
"""
    drawn = draw(ranks=(8, 8, 8), sizes={"layers.0.q": (4096, 4096)})
    for k, client in enumerate(drawn.drawn):
        write_client(tmp_path / f"one-{k}", client)
        own = client["layers.0.q"]
        many = {
            f"layers.{i}.q": Drawn(own.b.clone(), own.a.clone(), own.scaling) for i in range(64)
        }
        write_client(tmp_path / f"site-{k}", many)
    sums = 64 * 2 * 4096 * 8 * 8
    limit = sums // 2  # 16 MiB; the clients are 48 MiB
    for rule in ("fedit", "florist"):
        assert peak(warm, code, rule, tmp_path, limit) <= limit, rule
