"""Each rule's learning rate: chosen on the validation split, once, and the run goes on with it."""

import io
import json
import shutil

import pytest
from miniature import language, metrics, miniature, run, timeless
from rich.console import Console

from integration import compare as compare_module
from integration import tuning
from integration.__main__ import main
from integration.model.trainer import LocalTrainer
from integration.plan import plan, show
from integration.rounds import evaluate
from integration.rounds.engine import LocalEngine
from integration.rounds.evaluate import Score
from integration.rounds.federation import Federation
from integration.rounds.records import check_folder, open_folder, write_settings
from integration.rounds.rule import make_rule
from integration.rounds.server import Server
from integration.settings import SettingsError, from_preset
from integration.tuning import Trial, best

RATES = (1e-4, 2e-2)
RULES = ("fedit", "ffa")


def settings(**changes):
    tuned = {"learning_rates": RATES, "validation_size": 16, "client_test_size": 4, "seeds": 2}
    return miniature(**({"rules": RULES} | tuned | changes))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    console = Console(file=io.StringIO(), width=200)
    summary, lines = run(out, settings(), console=console)
    return out, summary, lines, console.file.getvalue()


def test_the_lowest_loss_decides():
    trials = [
        Trial("fedit", 0.1, 0.9, 1.0),
        Trial("fedit", 0.3, 0.1, 0.5),
        Trial("fedit", 0.9, None, None),
        Trial("fedit", 0.8, 0.5, float("nan")),
        Trial("ffa", 0.1, 0.9, 0.1),
        Trial("flora", 0.1, None, None),
    ]
    assert best(trials, "fedit") == 0.3
    with pytest.raises(SettingsError, match=r"flora diverges at every learning rate of 0\.1"):
        best(trials, "flora")


def test_of_several_seeds_the_worst_decides():
    trials = [
        Trial("fedit", 0.1, 0.9, 0.6, seed=0),
        Trial("fedit", 0.1, 0.9, 0.7, seed=1),
        Trial("fedit", 0.3, 0.9, 0.1, seed=0),
        Trial("fedit", 0.3, 0.5, 0.8, seed=1),
    ]
    assert best(trials, "fedit") == 0.1
    diverged = [*trials, Trial("fedit", 0.1, None, None, seed=2)]
    assert best(diverged, "fedit") == 0.3


def test_a_trial_looks_at_the_validation_split():
    federation = Federation.build(settings())
    trial = federation.trial(0.5)
    assert trial.test is federation.validation
    assert len(trial.test) == 16
    assert trial.train is federation.train
    assert [x.positions for x in trial.clients] == [x.positions for x in federation.clients]
    held_out = {example.text for example in federation.task.validation}
    seen = [*federation.task.train, *federation.task.test, *federation.task.shared]
    assert not held_out & {example.text for example in seen}
    assert trial.evaluate().loss != federation.evaluate().loss
    assert trial.settings.learning_rate == 0.5


def test_the_runs_are_those_of_the_chosen_rates(done, tmp_path):
    """Bit for bit what a run with this one learning rate gives."""
    out, summary, lines, _ = done
    trials = [Trial(**entry) for entry in json.loads((out / "tuning.json").read_text())]
    assert [(x.rule, x.learning_rate) for x in trials] == [(n, r) for r in RATES for n in RULES]
    chosen = json.loads((out / "settings.json").read_text())["learning_rates"]
    assert chosen == {rule: best(trials, rule) for rule in RULES}
    for entry in summary:
        rule, rate = entry["rule"], entry["learning_rate"]
        assert rate == chosen[rule]
        single = settings(rules=(rule,), learning_rate=rate, learning_rates=())
        _, alone = run(tmp_path / rule, single)
        assert timeless(lines[rule]) == timeless(alone[rule])
        assert {line["seed"] for line in lines[rule]} == {0, 1}


def test_every_rate_is_tried_under_the_first_seeds(tmp_path):
    run(tmp_path, settings(tuning_seeds=2, rules=("fedit",)))
    trials = [Trial(**entry) for entry in json.loads((tmp_path / "tuning.json").read_text())]
    assert [(x.learning_rate, x.seed) for x in trials] == [(r, s) for r in RATES for s in (0, 1)]
    assert len({x.loss for x in trials}) == len(trials)
    chosen = json.loads((tmp_path / "settings.json").read_text())["learning_rates"]
    assert chosen == {"fedit": best(trials, "fedit")}


def test_a_trials_loss_is_that_of_its_rounds(done):
    """The same rounds by hand: a run whose test split is the validation split."""
    out, *_ = done
    federation = Federation.build(settings()).trial(RATES[1])
    rule = make_rule(federation.settings, "ffa")
    server = Server(rule, federation.model, federation.clients, federation.settings)
    engine = LocalEngine(federation, LocalTrainer(federation.model, federation.settings))
    for number in (1, 2):
        updates = engine.train(server, number, lambda: None)
        record = server.finish(number, updates, federation.evaluate)
    (trial,) = [
        entry
        for entry in json.loads((out / "tuning.json").read_text())
        if (entry["rule"], entry["learning_rate"]) == ("ffa", RATES[1])
    ]
    assert (trial["loss"], trial["accuracy"]) == (record.loss, record.accuracy)


def test_one_line_a_round(done):
    *_, said = done
    lines = [line for line in said.splitlines() if "round 2 of 2" in line]
    assert len(lines) == len(RULES) * (len(RATES) + 2)
    assert lines[0].startswith("FedIT 0.0001, seed 0: round 2 of 2, accuracy ")
    assert "learning rates: fedit " in said


def fail(*_, **__):
    raise AssertionError("this was done before")


def test_what_is_done_is_not_done_again(done, tmp_path, monkeypatch):
    """From the files that are committed alone: no states, no adapters."""
    out, summary, _, _ = done
    for name in ("settings.json", "tuning.json", "metrics.jsonl"):
        shutil.copy(out / name, tmp_path / name)
    monkeypatch.setattr(tuning, "run_rounds", fail)
    monkeypatch.setattr(compare_module, "run_rounds", fail)
    again, _ = run(tmp_path, settings(), resume=True)
    assert again == summary
    assert (tmp_path / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()


def test_what_is_missing_is_run(done, tmp_path):
    """The last rule's second seed was cut off, and a trial was not kept."""
    out, summary, lines, _ = done
    shutil.copy(out / "settings.json", tmp_path / "settings.json")
    trials = json.loads((out / "tuning.json").read_text())
    (tmp_path / "tuning.json").write_text(json.dumps(trials[:3]))
    text = (out / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-100])
    again, found = run(tmp_path, settings(), resume=True)
    assert json.loads((tmp_path / "tuning.json").read_text()) == trials
    for rule in RULES:
        assert timeless(found[rule]) == timeless(lines[rule])
    for one, other in zip(again, summary, strict=True):
        assert {**one, "aggregation_ms": 0} == {**other, "aggregation_ms": 0}
    assert not list(tmp_path.rglob("tuning/**/*.pt"))


def test_a_rate_that_diverges_is_not_chosen(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    chosen = settings(rules=("ffa",), learning_rates=(1e30, 1e-3), seeds=1)
    run(tmp_path, chosen, console=console)
    assert "warning: ffa at learning rate 1e+30: client 0" in console.file.getvalue()
    trials = json.loads((tmp_path / "tuning.json").read_text())
    assert trials[0]["loss"] is None
    recorded = json.loads((tmp_path / "settings.json").read_text())
    assert recorded["learning_rates"] == {"ffa": 1e-3}


def test_without_resume_the_trials_are_gone(tmp_path):
    (tmp_path / "tuning.json").write_text("[]")
    open_folder(tmp_path, settings(), resume=False)
    assert not (tmp_path / "tuning.json").exists()


def test_where_the_data_lie_is_no_setting_of_the_run(tmp_path):
    write_settings(tmp_path, settings(data="here"), Score(0.5, 1.0))
    assert "here" not in (tmp_path / "settings.json").read_text()
    check_folder(tmp_path, settings(data="there"), resume=True)


def test_the_plan_counts_the_trials():
    console = Console(file=io.StringIO(), width=200)
    show(plan(settings()), console)
    assert "as many rounds of every rule at 2 learning rates, one seed" in console.file.getvalue()
    single = plan(settings(learning_rates=(), learning_rate=1.0))
    assert plan(settings()).examples == single.examples
    published = plan(from_preset("sst2-minilm"))
    assert sum(published.examples) == 29780 + 37569 - 2 * 50 - 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_size": 0}, "learning_rates needs validation_size"),
        ({"learning_rates": (0.1, 0.0)}, "learning_rates must be above 0"),
        ({"learning_rates": (float("inf"),)}, "learning_rates must be above 0"),
    ],
)
def test_what_cannot_be_tuned(changes, message):
    with pytest.raises(SettingsError, match=message):
        settings(**changes)


def test_one_rate_replaces_the_grid(capsys, tmp_path):
    assert from_preset("sst2-minilm", learning_rate=0.5).learning_rates == ()
    assert from_preset("quickstart", learning_rates=(0.1,), validation_size=9).learning_rate == 0.1
    flags = ["--learning-rates", "fast", "--out", str(tmp_path)]
    assert main(["compare", *flags]) == 2
    assert "learning_rates must be numbers" in capsys.readouterr().err


def test_answers_are_generated_for_the_first_questions(tmp_path, monkeypatch):
    """In the runs, not in the trials; a few are kept for people to read."""
    asked = []
    written = evaluate._written

    def counted(model, tokens, most, among):
        asked.append(list(among))
        return written(model, tokens, most, among)

    monkeypatch.setattr(evaluate, "_written", counted)
    chosen = language(
        rules=("fedit",), answers=5, learning_rates=(1e-3,), validation_size=4, evaluate_every=2
    )
    run(tmp_path, chosen)
    assert asked == [list(range(5))] * 2, "at the start and after the last round"
    first, last = metrics(tmp_path)["fedit"]
    assert first["texts"] == []
    assert len(last["texts"]) == evaluate.SHOWN
    questions = json.loads((tmp_path / "settings.json").read_text())["questions"]
    test = Federation.build(chosen).task.test
    assert [x["question"] for x in questions] == [x.question for x in test[: evaluate.SHOWN]]
    assert [x["reference"] for x in questions] == [x.completion for x in test[: evaluate.SHOWN]]
