"""Classification heads that the clients train: they learn, and they travel with every rule."""

import json

import pytest
import torch
from miniature import miniature, settings_like, written

import fedlora_kernels as flk
from integration.model.trainer import LocalTrainer
from integration.rounds.engine import LocalEngine
from integration.rounds.federation import Federation
from integration.rounds.server import Server


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` makes of the files goes with the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pairs(tmp_path):
    """Settings of GLUE pairs with a trained classifier, on a BERT of 20 thousand weights."""
    rows = [{"sentence1": f"a {n}", "sentence2": "bc"[n % 2], "label": n % 2} for n in range(40)]
    shape = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 16, "vocab_size": 300}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape | layers))
    return miniature(
        task="glue",
        task_options={"subset": "mrpc", "source": written(tmp_path / "mrpc", rows)},
        config=str(tmp_path),
        head="trained",
        loss="plain",
        shared_per_class=0,
        test_size=8,
    )


def test_a_trained_head_learns_pairs(pairs):
    """GLUE's setting: the classifier is trained with the factors."""
    made = Federation.build(pairs)
    settings = pairs
    start = made.model.fresh(8, 0)
    heads = [key for key in start.extras if "classifier" in key]
    assert heads, "the head travels with the adapter"
    trainer = LocalTrainer(made.model, settings)
    client = made.clients[0]
    update = client.train(made.model, trainer, made.train, start, 1, settings)
    assert all(not torch.equal(update.adapter.extras[key], start.extras[key]) for key in heads)
    trained, untrained = made.evaluate(update.adapter), made.evaluate(start)
    assert trained.loss != untrained.loss
    with made.model.carrying(update.adapter):
        batch = made.test.batch([0, 1])
        labels = batch.pop("labels")
        hooked = made.model.network(**batch).logits
    made.model.take(update.adapter)
    torch.testing.assert_close(made.model.network(**batch).logits, hooked, rtol=1e-4, atol=1e-5)
    assert labels.shape == (2,)


@pytest.mark.parametrize(
    ("rule", "after"),
    [
        ("fedit", None),
        ("florist", "merge"),
        ("flexlora", "merge"),
        ("flora", None),
        ("fedex", None),
        ("fedsa", None),
    ],
)
def test_heads_travel_with_every_rule(pairs, tmp_path, rule, after):
    """Averaged, also where the factors are merged and start afresh; FedSA's stay at home."""
    made = Federation.build(settings_like(pairs, after=after))
    server = Server(flk.rules.make(rule), made.model, made.clients, made.settings)
    engine = LocalEngine(made, LocalTrainer(made.model, made.settings))
    updates = engine.train(server, 1, lambda: None)
    record = server.finish(1, updates, made.evaluate)
    sizes = torch.tensor([update.examples for update in updates], dtype=torch.float64)
    starts = [server.start(client, 2) for client in made.clients]
    heads = [key for key in starts[0].extras if "classifier" in key]
    assert heads
    for key in heads:
        trained = torch.stack([update.adapter.extras[key].double() for update in updates], -1)
        mean = (trained @ (sizes / sizes.sum())).float()
        for place, start in enumerate(starts):
            expected = trained[..., place].float() if rule == "fedsa" else mean
            torch.testing.assert_close(start.extras[key], expected, rtol=1e-6, atol=1e-7)
    if rule != "fedsa":
        made.model.restore()
        assert made.evaluate(server.final()).loss == pytest.approx(record.loss, rel=1e-4)
