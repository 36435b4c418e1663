"""inspect: spectra, norms and similarities equal what the dense updates say."""

import itertools
import math

import pytest
import torch
from matplotlib.text import Text

from fedlora_kernels import Adapter, AdapterError, plot, reference
from fedlora_kernels._inspect import ENERGIES, Inspection, inspect, projection_names

EPS = torch.finfo(torch.float64).eps
Q, V, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "lm_head"
SIZES = {Q: (11, 7), V: (5, 13), HEAD: (17, 6)}


def only(*modules: str) -> dict[str, tuple[int, int]]:
    return {module: SIZES[module] for module in modules}


def lora(seed: int, rank: int, *, sizes=SIZES, zero=False, start=None, **config) -> Adapter:
    """A client with random factors for modules of these sizes; ``start`` is the seed of its A."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.Generator().manual_seed(seed if start is None else start)
    state = {}
    for module, (rows, columns) in sizes.items():
        b = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        state[f"base_model.model.{module}.lora_B.weight"] = b * (not zero)
        state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(
            rank, columns, generator=first, dtype=torch.float64
        )
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, **config}
    return Adapter.from_state_dict(state, fields, name=f"client-{seed}")


def dense(adapter: Adapter, module: str) -> torch.Tensor:
    if module in adapter.factors:
        return adapter.delta(module)
    return torch.zeros(SIZES[module], dtype=torch.float64)


HETEROGENEOUS = {
    "ranks-1-3-4": [lora(1, 1), lora(2, 3), lora(3, 4)],
    "absent-modules": [lora(1, 2, sizes=only(Q)), lora(2, 3, sizes=only(V, HEAD)), lora(3, 2)],
    "rslora-and-plain": [lora(1, 3, use_rslora=True), lora(2, 3)],
    "common-start": [lora(1, 3, start=9), lora(2, 3, start=9), lora(3, 3, start=9)],
    "one-client": [lora(1, 3)],
    "wider-than-the-module": [lora(seed, 5) for seed in range(4)],
    "from-the-dense-update": [lora(seed, 40) for seed in range(13)],
}


@pytest.fixture(params=HETEROGENEOUS, name="clients")
def _clients(request):
    return HETEROGENEOUS[request.param]


def test_spectra_are_those_of_the_dense_aggregate(clients):
    weights = [1.0 + k % 3 for k in range(len(clients))]
    found = inspect(clients, weights=weights)
    every = {module for client in clients for module in client.factors}
    assert set(found.modules) == every
    for module, spectrum in found.modules.items():
        ideal = sum(
            weight / sum(weights) * dense(client, module)
            for weight, client in zip(weights, clients, strict=True)
        )
        sigma = torch.linalg.svdvals(ideal)
        assert spectrum.size == SIZES[module]
        assert spectrum.norm == pytest.approx(float(ideal.norm()), rel=100 * EPS)
        rank = spectrum.stacked_rank
        counted = int((sigma.square() > rank * EPS * sigma[0].square()).sum())
        assert spectrum.numerical_rank == counted
        squares = torch.tensor(spectrum.sigma, dtype=torch.float64).square()
        gap = (squares - sigma[:counted].square()).abs().max()
        assert gap <= 100 * rank * EPS * sigma[0].square()
        shares = sigma.square().cumsum(0) / sigma.square().sum()
        for energy in ENERGIES:
            assert spectrum.ranks[energy] == int((shares < energy).sum()) + 1


def test_outliers_are_those_of_the_dense_updates():
    clients = [lora(seed, 3, start=9) for seed in range(7)]
    clients[2] = lora(2, 3, start=9, lora_alpha=600)
    weights = torch.tensor([1.0, 2, 1, 1, 3, 1, 0], dtype=torch.float64)
    found = inspect(clients, weights=weights.tolist())
    points = torch.stack(
        [torch.cat([dense(client, module).flatten() for module in SIZES]) for client in clients]
    )
    mean = weights @ points / weights.sum()
    median = reference.robust.median_point(points[:6], weights[:6])
    distances = (points - median).norm(dim=1)
    for k, row in enumerate(found.outliers):
        assert row.norm == pytest.approx(float(points[k].norm()), rel=1e-9)
        cosine = points[k] @ mean / points[k].norm() / mean.norm()
        assert row.cosine == pytest.approx(float(cosine), rel=1e-9)
        assert row.distance == pytest.approx(float(distances[k]), rel=1e-6)
        assert row.flagged == (k == 2)


def test_few_or_equal_clients_are_not_flagged():
    assert [row.flagged for row in inspect([lora(1, 2), lora(2, 2)]).outliers] == [False, False]
    (only_one,) = inspect([lora(1, 2)]).outliers
    assert (only_one.distance, only_one.flagged) == (0, False)
    for rows in (inspect([lora(1, 2)] * 3).outliers, inspect([lora(1, 2, zero=True)] * 3).outliers):
        assert [(row.distance, row.flagged) for row in rows] == [(0, False)] * 3
    assert inspect([vera(1, False)]).outliers == ()


def test_similarity_is_the_cosine_of_the_dense_updates(clients):
    found = inspect(clients)
    flat = torch.stack(
        [torch.cat([dense(client, module).flatten() for module in SIZES]) for client in clients]
    )
    norms = flat.norm(dim=1)
    expected = flat @ flat.T / norms[:, None] / norms[None, :]
    assert (torch.tensor(found.similarity, dtype=torch.float64) - expected).abs().max() <= 100 * EPS
    for facts, norm in zip(found.clients, norms.tolist(), strict=True):
        assert facts.norm == pytest.approx(norm, rel=100 * EPS)


def test_similarity_of_equal_opposite_and_zero_updates():
    first = lora(1, 3)
    opposite = Adapter.from_state_dict(
        {
            key: -tensor if ".lora_B." in key else tensor
            for key, tensor in first.state_dict().items()
        },
        first.config,
    )
    found = inspect([first, first, opposite, lora(4, 2, zero=True)])
    assert found.similarity[0][1] == pytest.approx(1, abs=100 * EPS)
    assert found.similarity[0][2] == pytest.approx(-1, abs=100 * EPS)
    assert all(math.isnan(value) for value in found.similarity[3])
    assert all(math.isnan(row[3]) for row in found.similarity)
    assert found.clients[3].norm == 0


def test_a_zero_aggregate_has_rank_zero():
    found = inspect([lora(1, 2, zero=True), lora(2, 3, zero=True)])
    for spectrum in found.modules.values():
        assert (spectrum.norm, spectrum.sigma) == (0, ())
        assert set(spectrum.ranks.values()) == {0}
    assert found.projections[0].energy == ()


def test_weights_move_the_aggregate_and_not_the_similarity():
    clients = [lora(1, 2), lora(2, 3)]
    equal, alone = inspect(clients), inspect(clients, weights=[1, 0])
    assert alone.similarity == equal.similarity
    assert alone.modules[Q].numerical_rank == 2
    assert equal.modules[Q].numerical_rank == 5
    assert [facts.weight for facts in alone.clients] == [1, 0]


def test_embeddings_are_inspected_like_other_modules():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 23, generator=generator)
    b = torch.randn(8, 3, generator=generator)
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    adapter = Adapter.from_state_dict(
        {f"{stem}A": a, f"{stem}B": b}, {"peft_type": "LORA", "r": 3, "lora_alpha": 3}
    )
    spectrum = inspect([adapter]).modules["model.embed_tokens"]
    sigma = torch.linalg.svdvals(b.double() @ a.double())[:3]
    assert spectrum.sigma == pytest.approx(sigma.tolist(), rel=1e-12)


def vera(seed: int, projections: bool) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99)
    state = {
        "base_model.model.q_proj.vera_lambda_b": torch.randn(9, generator=generator),
        "base_model.model.q_proj.vera_lambda_d": torch.randn(4, generator=generator),
    }
    if projections:
        state["base_model.vera_A"] = torch.randn(4, 7, generator=shared)
        state["base_model.vera_B"] = torch.randn(9, 4, generator=shared)
    return Adapter.from_state_dict(state, {"peft_type": "VERA", "r": 4}, name=f"vera-{seed}")


def test_vera_with_its_projections():
    clients = [vera(1, True), vera(2, True)]
    found = inspect(clients)
    assert [(facts.kind, facts.ranks, facts.modules) for facts in found.clients] == [
        ("VeRA", (4,), 1)
    ] * 2
    ideal = sum(client.delta("q_proj") for client in clients) / 2
    assert found.modules["q_proj"].norm == pytest.approx(float(ideal.norm()), rel=100 * EPS)
    assert any("saved projection" in note for note in found.notes)


def test_vera_without_projections_has_facts_and_no_spectrum():
    found = inspect([vera(1, False)])
    assert (found.modules, found.projections) == ({}, ())
    assert math.isnan(found.clients[0].norm)
    assert found.clients[0].bytes == 4 * (9 + 4)
    assert any("without its saved projections" in note for note in found.notes)


def test_facts_of_a_client():
    pattern = {"rank_pattern": {"lm_head": 2}, "use_rslora": True}
    state = lora(1, 4, sizes=only(Q, V)).state_dict() | lora(2, 2, sizes=only(HEAD)).state_dict()
    state["base_model.model.score.weight"] = torch.zeros(3, 5)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": "tiny"}
    facts = inspect([Adapter.from_state_dict(state, fields | pattern, name="c")]).clients[0]
    assert (facts.name, facts.kind, facts.base_model) == ("c", "rsLoRA", "tiny")
    assert (facts.modules, facts.ranks, facts.extras) == (3, (2, 4), 1)
    assert facts.scalings == pytest.approx((2, 4 / math.sqrt(2)))
    assert facts.dtypes == ("float64",)
    assert facts.bytes == sum(tensor.nbytes for tensor in state.values())


def test_notes_name_what_rules_refuse_and_what_is_absent():
    clients = [lora(1, 2, task_type="SEQ_CLS"), lora(2, 2, sizes=only(Q))]
    clients.append(lora(3, 2, task_type="CAUSAL_LM"))
    notes = inspect(clients).notes
    assert any(note.startswith("client 1 (client-2): 2 modules are absent") for note in notes)
    assert any(note.startswith("client 2 (client-3): task_type") for note in notes)


def test_a_remark_about_many_clients_is_made_once():
    clients = [lora(0, 2)] + [lora(seed, 2, sizes=only(Q)) for seed in range(1, 9)]
    (note,) = inspect(clients).notes
    assert "and 5 more" in note


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.5, math.nan])
def test_an_energy_outside_its_range_is_refused(energy):
    with pytest.raises(ValueError, match="energy"):
        inspect([lora(1, 2)], energies=[energy])


def test_clients_of_different_models_are_refused():
    other = lora(1, 2, sizes=only(Q))
    wide = {key: torch.cat([t, t]) if "_B" in key else t for key, t in other.state_dict().items()}
    with pytest.raises(AdapterError, match=f"module {Q}: the update is 22 x 7, expected 11 x 7"):
        inspect([other, Adapter.from_state_dict(wide, other.config)])


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        (
            ["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "lm_head"],
            ["q_proj", "q_proj", "lm_head"],
        ),
        (
            [
                "encoder.layer.0.attention.output.dense",
                "encoder.layer.0.output.dense",
                "encoder.layer.0.attention.self.query",
            ],
            ["attention.output.dense", "output.dense", "query"],
        ),
        (
            [
                "decoder.block.0.layer.0.SelfAttention.q",
                "decoder.block.0.layer.1.EncDecAttention.q",
                "decoder.block.3.layer.0.SelfAttention.q",
            ],
            ["SelfAttention.q", "EncDecAttention.q", "SelfAttention.q"],
        ),
        (["model.layers.2.experts.7.w1", "net.0"], ["w1", "net.0"]),
    ],
    ids=["llama", "bert", "t5", "experts-and-bare-numbers"],
)
def test_projection_names(modules, names):
    assert list(projection_names(modules).values()) == names


def test_modules_are_listed_in_the_order_of_the_layers():
    names = [f"model.layers.{layer}.q_proj" for layer in (0, 2, 10, 9)]
    assert list(inspect([lora(1, 2, sizes=dict.fromkeys(names, (3, 4)))]).modules) == sorted(
        names, key=lambda name: int(name.split(".")[2])
    )


def test_a_projection_pools_its_modules():
    names = ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    sizes = dict(zip(names, [(6, 4), (5, 9)], strict=True))
    found = inspect([lora(1, 2, sizes=sizes), lora(2, 3, sizes={names[1]: sizes[names[1]]})])
    (pooled,) = found.projections
    total = sum(spectrum.norm**2 for spectrum in found.modules.values())
    assert 2 * sum(value**2 for value in pooled.sigma) == pytest.approx(total)
    assert pooled.energy[-1] == pytest.approx(1)
    assert list(pooled.energy) == sorted(pooled.energy)
    assert len(pooled.sigma) == 5


def drawn(found: Inspection):
    made = plot.figure(found)
    made.canvas.draw()
    return made, made.axes


@pytest.mark.parametrize("count", [2, 3, 30])
def test_the_figure_shows_every_projection_and_every_client(count):
    found = inspect([lora(seed, 1 + seed % 4) for seed in range(count)])
    _, (spectrum, energy, similarity, _bar) = drawn(found)
    assert len(spectrum.lines) == len(found.projections)
    for line, projection in zip(spectrum.lines, found.projections, strict=True):
        assert line.get_ydata().tolist() == pytest.approx(projection.sigma)
    assert spectrum.get_yscale() == "log"
    labels = {text.get_text(): text for text in spectrum.texts}
    assert set(labels) == {projection.name for projection in found.projections}
    colors = [line.get_color() for line in spectrum.lines]
    assert [labels[p.name].get_color() for p in found.projections] == colors
    assert {text.get_text() for text in energy.texts} == {f"{share:g}" for share in ENERGIES}
    image = torch.tensor(similarity.images[0].get_array().tolist(), dtype=torch.float64)
    assert torch.equal(image, torch.tensor(found.similarity, dtype=torch.float64))
    ticks = [label.get_text() for label in similarity.get_yticklabels()]
    assert ticks == [f"client-{index}  {index}" for index in range(count)]
    assert len(similarity.texts) == (count * count if count <= 12 else 0)


@pytest.mark.parametrize("count", [3, 14])
def test_labels_in_the_figure_do_not_overlap(count):
    sizes = {f"model.layers.0.projection_{index}": (6, 7) for index in range(count)}
    made, axes = drawn(inspect([lora(1, 2, sizes=sizes)]))
    extents = [Text.get_window_extent(text) for text in axes[0].texts]  # without the leaders
    boxes = sorted((extent.y0, extent.y1) for extent in extents)
    assert len(boxes) == count
    for (_, top), (bottom, _) in itertools.pairwise(boxes):
        assert bottom > top
    assert boxes[0][0] > 0
    assert boxes[-1][1] < made.bbox.height


@pytest.mark.parametrize(
    ("clients", "text"),
    [
        ([lora(1, 2, zero=True)], "the ideal aggregate is zero"),
        ([vera(1, False)], "no factors to decompose"),
        ([lora(1, 2, zero=True), lora(2, 2, zero=True)], "the ideal aggregate is zero"),
    ],
    ids=["zero", "vera-vectors-only", "all-zero"],
)
def test_the_figure_says_when_there_is_nothing_to_draw(clients, text):
    _, axes = drawn(inspect(clients))
    assert [item.get_text() for item in axes[0].texts] == [text]
    assert len(axes) == (2 if len(clients) == 1 else 4)


def test_clients_in_folders_of_one_name_are_told_apart():
    clients = [lora(seed, 1) for seed in range(2)]
    for adapter, name in zip(clients, ["run/1/final", "run/2/final"], strict=True):
        adapter.name = name
    _, axes = drawn(inspect(clients))
    ticks = [label.get_text() for label in axes[2].get_yticklabels()]
    assert ticks == ["run/1/final  0", "run/2/final  1"]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_suffix_is_the_format(tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    plot.save(inspect([lora(1, 2), lora(2, 2)]), str(path))
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(start)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'xyz'"):
        plot.save(inspect([lora(1, 2)]), str(tmp_path / "figure.xyz"))
