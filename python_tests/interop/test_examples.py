"""Every example runs, and gives what the library gives."""

import json
import os
import runpy
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import fedlora_kernels as flk

EXAMPLES = Path(flk.__file__).parents[1] / "examples"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_peft_folders(sites, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "peft_folders.py", tmp_path / "global", *sites)
    found = flk.Adapter.load(tmp_path / "global")
    clients = [flk.Adapter.load(site) for site in sites]
    expected = flk.aggregate(clients, rule="florist", energy=0.9)
    said = capsys.readouterr().out
    for module, row in expected.report.items():
        assert torch.equal(found.factors[module].b, expected.adapter.factors[module].b)
        assert f"{module}: rank {row.rank}, relative error " in said


def test_live_peft_model(monkeypatch, capsys):
    model = run(monkeypatch, "live_peft_model.py")["model"]
    assert list(model.peft_config) == ["berlin", "rome", "mixed"]
    assert capsys.readouterr().out.startswith("mixed: ")


def test_numpy_only():
    run_alone(EXAMPLES / "numpy_only.py", "torch", "rank 8 of 12, relative error 0.1342\n")


def test_torch_compile(monkeypatch, capsys):
    names = run(monkeypatch, "torch_compile.py")
    expected = flk.ops.stacked_svd(names["b"], names["a"], names["scale"], 0.9)
    assert torch.equal(names["ranks"], expected[3])
    assert torch.allclose(names["update"], expected[0] @ expected[1], rtol=0, atol=1e-4)
    assert len(capsys.readouterr().out.splitlines()) == 2


def run_alone(path, without, expected):
    """In a process of its own, where one package cannot be imported."""
    code = f"import runpy, sys; sys.modules[{without!r}] = None; runpy.run_path({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_notebook():
    """Every cell runs; FLoRIST's row is at its floor, and FedIT's is not."""
    cells = json.loads((EXAMPLES / "combine_adapters.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    names = {}
    for source in sources:
        exec(compile(source, "combine_adapters.ipynb", "exec"), names)
    rows = [result.report["layers.0.q_proj"] for result in names["results"]]
    assert rows[0].relative_error > 1.2 * rows[0].svd_floor
    assert rows[2].relative_error == pytest.approx(rows[2].svd_floor, rel=1e-3)
    assert rows[3].relative_error < 1e-6
    assert (names["folder"] / "adapter_model.safetensors").is_file()


# ---- Flower ------------------------------------------------------------------------------------


def expected_of_flower():
    """The same two rounds in this process, without Flower."""
    from flowertune.task import get_model, train
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    arrays = get_peft_model_state_dict(get_model())
    arrays = {key: tensor.clone() for key, tensor in arrays.items()}
    for _ in range(2):
        clients, weights = [], []
        for client in range(2):
            model = get_model()
            set_peft_model_state_dict(model, arrays)
            weights.append(train(model, client, 4, 0.01)[1])
            clients.append(flk.Adapter.from_model(model))
        result = flk.aggregate(clients, rule="florist", weights=weights)
        sent = flk.Adapter.from_state_dict(arrays, clients[0].config)
        arrays = result.adapter.fit(sent).state_dict()
    return arrays


def assert_near(folder, expected):
    found = flk.Adapter.load(folder)
    config = found.config
    expected = flk.Adapter.from_state_dict(expected, config)
    for module in expected.factors:
        wanted = expected.delta(module)
        assert wanted.norm() > 0
        assert (found.delta(module) - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize(
    "where", ["simulation", pytest.param("deployment", marks=pytest.mark.slow)]
)
def test_flower(where, tmp_path, monkeypatch):
    """The nodes' order is Flower's, so sums may be rounded differently."""
    pytest.importorskip("flwr", reason="needs Flower: the extra flower")
    from flower_processes import deploy
    from flower_processes import run as flwr_run

    monkeypatch.syspath_prepend(str(EXAMPLES / "flower"))
    values = {"out": json.dumps(str(tmp_path / "global"))}
    with ExitStack() as stack:
        link = deploy(stack, tmp_path, 2)[0] if where == "deployment" else None
        flwr_run(EXAMPLES / "flower", tmp_path, values, superlink=link)
    assert_near(tmp_path / "global", expected_of_flower())


# ---- NVFlare -----------------------------------------------------------------------------------


def expected_of_nvflare(folder):
    """The same two rounds in this process, without NVFlare."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    task = runpy.run_path(str(folder / "task.py"))
    clients, result = {}, None
    for _ in range(2):
        for site, rank in task["RANKS"].items():
            model = task["get_model"](rank)
            if result is not None:
                set_peft_model_state_dict(model, result.adapter.fit(clients[site]).state_dict())
            task["train"](model, site)
            clients[site] = flk.Adapter.from_state_dict(
                {k: x.clone() for k, x in get_peft_model_state_dict(model).items()},
                {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank},
            )
        result = flk.aggregate(
            list(clients.values()), rule="florist", energy=0.9, weights=list(task["STEPS"].values())
        )
    return result.adapter.fit(clients["site-1"])


def test_nvflare(tmp_path):
    """Two sites of ranks 8 and 4 in bfloat16, in NVFlare's simulator: 15 s of one core."""
    pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'nvflare==2.9.*'")
    folder = EXAMPLES / "nvflare"
    ran = subprocess.run(
        [sys.executable, folder / "job.py", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (saved,) = tmp_path.rglob("FL_global_model.pt")
    found = torch.load(saved, weights_only=True)["model"]
    expected = expected_of_nvflare(folder)
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    served = flk.Adapter.from_state_dict(found, expected.config)
    for module in expected.factors:
        wanted = expected.delta(module)
        assert wanted.norm() > 0
        assert (served.delta(module) - wanted).norm() <= 0.02 * wanted.norm()
