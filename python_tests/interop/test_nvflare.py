"""LoraAggregator: what flk.aggregate gives, through NVFlare's models; who is lost, and why."""

import json
import logging
import math
import re

import numpy as np
import pytest
import torch
from anonymous import peak
from federation import draw

import fedlora_kernels as flk

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'nvflare==2.9.*'")

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_opt.pt.recipes import FedAvgRecipe
from nvflare.client.config import ExchangeFormat

from fedlora_kernels.interop.nvflare import LoraAggregator, updates

SITES = ("site-1", "site-2", "site-3")
STEPS = "NUM_STEPS_CURRENT_ROUND"
UNEQUAL = {"ranks": (4, 2, 6), "alphas": (4, 8, 3)}
RULES = {
    "fedit": {},
    "florist": {"energy": 0.8},
    "flora_na": {},
    "fedsa": {},
    "flexlora": {},
    "hetlora": {},
    "ffa": {},
}
ADMITTED = [
    (rule, ranks)
    for rule in RULES
    for ranks in ("equal", "unequal")
    if ranks == "equal" or flk.rules.find(rule).heterogeneous
]


def fetched(aggregator, site, model):
    """What a site is given: NVFlare's own event, on the data of a task for all sites."""
    context, peer = FLContext(), FLContext()
    peer.get_identity_name = lambda: site
    context.set_peer_context(peer)
    data = FLModelUtils.to_shareable(model)
    context.set_prop(FLContextKey.TASK_NAME, "train", private=True, sticky=False)
    context.set_prop(FLContextKey.TASK_DATA, data, private=True, sticky=False)
    aggregator.handle_event(EventType.BEFORE_TASK_DATA_FILTER, context)
    return FLModelUtils.from_shareable(data)


def run(aggregator, answer, initial, rounds=1):
    """FedAvg's rounds; the models that the sites were given in each, and the last global one."""
    model, given = FLModel(params=initial), []
    for number in range(rounds):
        aggregator.reset_stats()
        given.append({site: fetched(aggregator, site, model) for site in SITES})
        for k, site in reversed(list(enumerate(SITES))):  # results come in any order
            result = answer(k, given[-1][site], number)
            if result is not None and result.params:  # as FedAvg does
                result.meta["client_name"] = site
                aggregator.accept_model(result)
        model = FLModelUtils.update_model(model, aggregator.aggregate_model())
    return given, model


def answers(round_, change=None, configs=True):
    """Every site sends what was drawn for it, whatever it was given."""

    def answer(k, received, number):
        adapter = round_.adapters[k]
        meta = {STEPS: round_.weights[k]}
        if configs:
            meta["adapter_config"] = json.dumps(adapter.config)
        result = FLModel(params=adapter.state_dict(), metrics={"loss": 0.5, "text": "x"}, meta=meta)
        return change(k, result, number) if change else result

    return answer


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(("rule", "ranks"), ADMITTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_is_that_of_aggregate(rule, ranks, dtype):
    round_ = draw(dtype=dtype, common_a=rule == "ffa", **(UNEQUAL if ranks == "unequal" else {}))
    expected = round_.aggregate(rule, **RULES[rule])
    largest = round_.adapters[2].state_dict()
    made = LoraAggregator(rule, RULES[rule])
    given, model = run(made, answers(round_), largest, rounds=2)
    assert not made.lost
    assert_same(made.result.adapter.state_dict(), expected.adapter.state_dict())
    assert {k: x.shape for k, x in model.params.items()} == {k: x.shape for k, x in largest.items()}
    for k, site in enumerate(SITES):
        assert_same(given[0][site].params, dict(largest))
        found, own = given[1][site].params, round_.adapters[k]
        assert {key: (x.shape, x.dtype) for key, x in found.items()} == {
            key: (x.shape, x.dtype) for key, x in own.state_dict().items()
        }
        wanted = expected.client_adapter(k).fit(own)
        close = 1e-5 if dtype == torch.float32 else 0.02
        for module in round_.modules if ranks == "equal" or expected.delivery.differs else ():
            received = flk.Adapter.from_state_dict(found, own.config)
            gap = received.delta(module) - wanted.delta(module)
            assert gap.norm() <= close * (1 + wanted.delta(module).norm())
    assert model.metrics == {
        "loss": pytest.approx(0.5),
        "relative-error": expected.report.relative_error,
        "svd-floor": expected.report.svd_floor,
        "rank": expected.report.mean_rank,
        "bytes-up": sum(expected.bytes_up),
        "bytes-down": sum(expected.bytes_down),
        "clients": 3,
        "lost-sites": [],
    }


def test_robust_weights_are_those_of_aggregate():
    drawn = draw(alphas=(4, 400, 4))
    made = LoraAggregator("florist", robust="trimmed", robust_options={"attackers": 1})
    _, model = run(made, answers(drawn), drawn.adapters[0].state_dict())
    expected = drawn.aggregate("florist", robust=flk.robust.Trimmed(attackers=1))
    assert model.metrics["robust-weights"] == expected.weighing.weights
    assert_same(made.result.adapter.state_dict(), expected.adapter.state_dict())


def test_numpy_arrays_come_and_go():
    """The recipe's default exchange."""
    round_ = draw()

    def as_numpy(k, result, _):
        result.params = {key: x.numpy() for key, x in result.params.items()}
        return result

    made = LoraAggregator("fedit")
    initial = {key: x.numpy() for key, x in round_.adapters[0].state_dict().items()}
    given, model = run(made, answers(round_, as_numpy), initial, rounds=2)
    assert_same(made.result.adapter.state_dict(), round_.aggregate("fedit").adapter.state_dict())
    for params in (model.params, given[1]["site-2"].params):
        assert all(isinstance(x, np.ndarray) for x in params.values())


# ---- results that cannot be used ---------------------------------------------------------------


def with_tensor(change):
    """The first tensor goes through ``change``; None takes it away."""

    def made(result):
        first = sorted(result.params)[0]
        new = change(result.params.pop(first).clone())
        if new is not None:
            result.params[first] = new
        return result

    return made


def renamed(result):
    first = sorted(result.params)[0]
    result.params["other." + first] = result.params.pop(first)
    return result


def with_(**changes):
    def change(result):
        result.meta |= {key: x for key, x in changes.items() if key != "params_type"}
        result.params_type = changes.get("params_type", result.params_type)
        return result

    return change


def empty(result):
    result.params = {}
    return result


BROKEN = {
    "rank 1": (with_tensor(lambda x: x[:1]), r"lora_A\S+ is torch.float32 \[1, 17\], expected"),
    "half of a tensor": (with_tensor(lambda x: x[:, :8]), r"is torch.float32 \[4, 8\], expected"),
    "another dtype": (with_tensor(lambda x: x.half()), "is torch.float16"),
    "no tensor": (with_tensor(lambda x: "text"), "lora_A.weight is a str"),
    "NaN": (with_tensor(lambda x: x.fill_(math.nan)), "holds NaN or infinite values"),
    "another name": (renamed, "found 'other' before PEFT's prefix"),
    "one less": (with_tensor(lambda _: None), r"its update lacks \S+lora_A"),
    "nothing": (empty, "it sent nothing, or its task failed or was late"),
    "no reply": (lambda _: None, "it sent nothing, or its task failed or was late"),
    "differences": (with_(params_type=ParamsType.DIFF), "expected FULL: factors are aggregated"),
    "no weight": (with_(**{STEPS: None}), f"its meta has no number '{STEPS}', found None"),
    "a weight of NaN": (with_(**{STEPS: math.nan}), "its weight is nan, expected a finite number"),
    "no JSON": (with_(adapter_config="{"), "its adapter_config is not valid JSON"),
    "a list": (with_(adapter_config="[]"), "its adapter_config holds no JSON object"),
    "JSON with NaN": (with_(adapter_config='{"any": NaN}'), "its adapter_config is not valid JSON"),
    "inf": (with_(adapter_config={"any": math.inf}), "its adapter_config is not valid JSON"),
    "scaling 0": (with_(adapter_config={"r": 4, "lora_alpha": 0}), "scaling 0, with which no upd"),
    "a truth value": (with_(**{STEPS: np.bool_(True)}), f"its meta has no number '{STEPS}', found"),
}


@pytest.mark.parametrize("rule", ["fedit", "flexlora"])
@pytest.mark.parametrize(("break_", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_result_leaves_the_round_with_the_rest(break_, said, rule, caplog):
    round_ = draw()
    if said.startswith(r"lora_A\S+ is") and rule == "flexlora":
        said = "factors have rank|expected"  # any rank, but not another than its config says
    made = LoraAggregator(rule)
    broken = answers(round_, lambda k, result, _: break_(result) if k == 1 else result)
    with caplog.at_level(logging.WARNING):
        _, model = run(made, broken, round_.adapters[0].state_dict(), rounds=2)
    assert model.metrics["lost-sites"] == ["site-2"]
    assert model.metrics["clients"] == 2
    assert re.search(said, made.lost["site-2"]), made.lost
    assert "site site-2 is not in the round: " in caplog.text
    rest = [round_.adapters[k] for k in (0, 2)]
    expected = flk.aggregate(rest, rule=rule, weights=[round_.weights[k] for k in (0, 2)])
    assert_same(made.result.adapter.state_dict(), expected.adapter.state_dict())


@pytest.mark.parametrize("odd", range(3))
@pytest.mark.parametrize("rule", ["florist", "fedit", "flexlora"])
def test_a_site_that_cannot_hold_the_result_stops_the_job(rule, odd, monkeypatch):
    """NVFlare sends FedAvg's model, of another scaling, where its event only raises an error."""
    alphas = [2.0**-12 if k == odd else 800 for k in range(3)]
    round_ = draw(alphas=alphas, dtype=torch.float16)
    made, panics = LoraAggregator(rule), []
    monkeypatch.setattr(made, "system_panic", lambda reason, fl_ctx: panics.append(reason))
    _, model = run(made, answers(round_), round_.adapters[0].state_dict())
    assert not panics
    for site in SITES:
        assert ("trains" in fetched(made, site, model).meta) == (site != SITES[odd])
    (said,) = panics
    assert re.match(
        rf"site {SITES[odd]}: site {SITES[odd]}, module .* overflows torch.float16", said
    )


@pytest.mark.parametrize(
    "kind", [int, float, np.int64, np.int32, np.uint8, np.float64, np.float32, np.float16]
)
def test_numbers_may_be_numpys(kind):
    """NVFlare's serialization keeps them."""
    round_ = draw()

    def counted(k, result, _):
        result.meta[STEPS] = kind(round_.weights[k])
        result.metrics = {"score": kind(k + 1), "done": np.bool_(True), "list": np.ones(2)}
        return result

    made = LoraAggregator("fedit")
    _, model = run(made, answers(round_, counted), round_.adapters[0].state_dict())
    assert not made.lost
    assert_same(made.result.adapter.state_dict(), round_.aggregate("fedit").adapter.state_dict())
    assert model.metrics["score"] == pytest.approx((50 * 1 + 20 * 2 + 30 * 3) / 100)
    assert not {"done", "list"} & set(model.metrics)


def test_a_round_without_any_site_is_an_error():
    round_ = draw()
    made = LoraAggregator("florist")
    with pytest.raises(flk.AdapterError, match="round 1 has no client left: site site-1: it sent"):
        run(made, lambda *_: None, round_.adapters[0].state_dict())


def test_a_site_that_replies_twice_is_lost():
    round_ = draw()
    made = LoraAggregator("fedit")
    made.reset_stats()
    for k in (0, 1, 2, 1):
        result = answers(round_)(k, None, 0)
        result.meta["client_name"] = SITES[k]
        made.accept_model(result)
    assert made.aggregate_model().metrics["lost-sites"] == ["site-2"]


def test_without_any_steps_sites_count_equally():
    round_ = draw()

    def silent(k, result, _):
        del result.meta[STEPS]
        return result

    made = LoraAggregator("fedit")
    run(made, answers(round_, silent), round_.adapters[0].state_dict())
    expected = flk.aggregate(list(round_.adapters), rule="fedit")
    assert_same(made.result.adapter.state_dict(), expected.adapter.state_dict())


def test_the_model_must_have_the_rank_of_a_site():
    round_ = draw(**UNEQUAL)
    small = draw(ranks=(3, 3, 3)).adapters[0].state_dict()
    with pytest.raises(flk.AdapterError, match=r"recipe's model has \S+ \[3, 17\].* \[6, 17\]: gi"):
        run(LoraAggregator("florist"), answers(round_), small)


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", flk.rules.names())
def test_a_limit_changes_no_bit(rule, tmp_path):
    """Of what every site and the server get, in three rounds of sites that start from their own."""
    found = flk.rules.find(rule)
    shapes = UNEQUAL if found.heterogeneous else {"alphas": (8, 8, 8)}
    round_ = draw(common_a=found.trains != "both", **shapes)

    def halfway(k, received, number):
        result = answers(round_)(k, received, number)
        result.meta["merges"] = True
        for key, x in result.params.items():
            sent = received.params[key]
            if {"a": "lora_B", "b": "lora_A"}.get(received.meta["trains"], "none") in key:
                result.params[key] = sent
            elif x.shape == sent.shape:
                result.params[key] = (x + sent) / 2
        return result

    initial = round_.adapters[2].state_dict()
    free = LoraAggregator(rule)
    limited = LoraAggregator(rule, memory_limit=1, scratch=str(tmp_path))
    (given, model), (same, other) = (run(made, halfway, initial, 3) for made in (free, limited))
    assert not free.lost
    assert_same(other.params, model.params)
    for name, figure in model.metrics.items():
        assert other.metrics[name] == (figure if name == "lost-sites" else pytest.approx(figure))
    for one, two in zip(given, same, strict=True):
        for site in SITES:
            assert_same(two[site].params, one[site].params)
    assert not list(tmp_path.iterdir()), "the files have no names"


SITES_ARRIVE = """
from nvflare.app_common.abstract.fl_model import FLModel
from fedlora_kernels.interop.nvflare import LoraAggregator

def adapter(modules):
    return {
        f"base_model.model.layers.{i}.q.lora_{side}.weight": torch.randn(shape)
        for i in range(modules) for side, shape in (("A", (4, 4096)), ("B", (4096, 4)))
    }

def round_of(sites, modules):
    options = {"max_rank": 4} if sys.argv[1] == "florist" else {}
    made = LoraAggregator(sys.argv[1], options, memory_limit=1 << 20)
    made.reset_stats()
    initial = adapter(modules)
    for k in range(sites):
        made.sent(str(k), initial)
    for k in range(sites):
        result = FLModel(params=adapter(modules), meta={"client_name": str(k)})
        made.accept_model(result)
    assert made.aggregate_model().metrics["clients"] == sites
"""


@pytest.mark.parametrize("rule", ["fedit", "florist"])
def test_memory_does_not_grow_with_the_sites(rule):
    """Anonymous memory of a round: 40 sites of 2 MiB take no more than 4 of them, the limit, and
    one module of all sites in float64, which is worked on however large it is.
    """
    one = 16 * 2 * 4096 * 4 * 4
    module = 40 * 2 * 4096 * 4 * 8
    few, many = (
        peak(SITES_ARRIVE + "round_of(2, 1)\n", f"round_of({sites}, 16)\n", rule)
        for sites in (4, 40)
    )
    assert many <= few + 4 * one + (1 << 20) + module, (few, many)


# ---- rules that merge or remember --------------------------------------------------------------


def test_rules_that_merge_need_sites_that_declare_it():
    round_ = draw(**UNEQUAL)
    initial = round_.adapters[2].state_dict()
    with pytest.raises(flk.AdapterError, match=r"flora merges its result .* must declare"):
        run(LoraAggregator("flora"), answers(round_), initial)

    def once_late(k, result, number):
        """Site 3 misses the second round, and gets both updates in the third."""
        result.meta["merges"] = True
        return None if (k, number) == (2, 1) else result

    given, _ = run(LoraAggregator("flora"), answers(round_, once_late), initial, rounds=3)
    places = [[list(updates(models[site])) for site in SITES] for models in given]
    assert places == [[[], [], []], [[0], [0], [0]], [[1], [1], [0, 1]]]
    expected = round_.aggregate("flora").adapter
    assert_same(updates(given[1]["site-2"])[0].state_dict(), expected.state_dict())
    zero = (x for key, x in given[1]["site-2"].params.items() if "lora_B" in key)
    assert not any(x.any() for x in zero)


def test_rounds_tell_what_to_train():
    round_ = draw(common_a=True)

    def obeying(k, received, number):
        """The factor that is not trained is what it was sent."""
        result = answers(round_)(k, received, number)
        fixed = {"a": "lora_B", "b": "lora_A"}[received.meta["trains"]]
        result.params |= {key: x for key, x in received.params.items() if fixed in key}
        return result

    made = LoraAggregator("rolora")
    given, _ = run(made, obeying, round_.adapters[0].state_dict(), 2)
    assert not made.lost
    assert [model.meta["trains"] for models in given for model in models.values()] == [
        *["b"] * 3,
        *["a"] * 3,
    ]


def test_a_job_that_is_submitted_again_goes_on(tmp_path):
    round_ = draw(**UNEQUAL)
    initial, file = round_.adapters[2].state_dict(), str(tmp_path / "state.pt")

    def moving(k, received, number):
        result = answers(round_)(k, received, number)
        result.params = {
            key: (x + received.params[key]) / 2 if received.params[key].shape == x.shape else x
            for key, x in result.params.items()
        }
        return result

    whole = LoraAggregator("flexlora")
    _, unbroken = run(whole, moving, initial, rounds=3)
    run(LoraAggregator("flexlora", state=file), moving, initial, rounds=2)
    _, resumed = run(LoraAggregator("flexlora", state=file), moving, initial, rounds=1)
    assert_same(resumed.params, unbroken.params)


# ---- jobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["florist", flk.rules.FLoRIST(energy=0.7)], ids=["name", "rule"])
def test_a_job_holds_the_aggregators_arguments(rule, tmp_path):
    """What a server builds from the exported job is what was given to the recipe."""
    given = {
        "adapter_config": {"r": 4, "lora_alpha": 8},
        "weighted_by_key": "n",
        "magnitudes": "average",
    }
    more = {"memory_limit": 10**9, "scratch": "/var/tmp", "robust": flk.robust.Krum(attackers=2)}
    made = LoraAggregator(rule, **more, **given)
    (tmp_path / "client.py").touch()
    recipe = FedAvgRecipe(
        model={"class_path": "torch.nn.Linear", "args": {"in_features": 2, "out_features": 2}},
        min_clients=2,
        train_script=str(tmp_path / "client.py"),
        aggregator=made,
        server_expected_format=ExchangeFormat.PYTORCH,
    )
    recipe.export(str(tmp_path / "job"))
    (file,) = (tmp_path / "job").rglob("config_fed_server.*")
    written = json.loads(file.read_text())["workflows"][0]["args"]["aggregator"]
    assert written["path"] == "fedlora_kernels.interop.nvflare.LoraAggregator"
    again = LoraAggregator(**written["args"])
    assert again.exchange.rule == made.exchange.rule
    assert {name: getattr(again, name) for name in given} == given
    assert (again.memory_limit, again.scratch) == (10**9, "/var/tmp")
    assert again.exchange.robust == flk.robust.Krum(attackers=2)


def test_unknown_rules_and_options():
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        LoraAggregator("best")
    with pytest.raises(ValueError, match="memory_limit must be at least 1 byte, found 0"):
        LoraAggregator("fedit", memory_limit=0)
    with pytest.raises(TypeError, match="'fedit' has no option 'energy'"):
        LoraAggregator("fedit", {"energy": 0.5})
