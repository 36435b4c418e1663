"""What people send that is not a PEFT folder: recognized by its contents, with what helps."""

import json
from pathlib import Path

import pytest
import torch
from federation import draw
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import fedlora_kernels as flk

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\nsize 1234\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def site(path="site", seed=0):
    draw(seed=seed).adapters[0].save(path)
    return Path(path)


def refused(path="site", **options):
    """The message, which begins with the folder and has two lines at most."""
    with pytest.raises(flk.AdapterError) as caught:
        flk.Adapter.load(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) <= 2
    assert max(map(len, message.splitlines())) <= 240
    return message


@pytest.mark.parametrize("inside", ["default", "checkpoint-100", "out/checkpoint-7", "a/b/c"])
def test_an_adapter_in_a_subfolder_is_found(inside):
    site(f"site/{inside}")
    assert f"site/{inside}: give that folder" in refused()


def test_the_last_checkpoint_is_named_last():
    for step in (50, 100, 9):
        site(f"site/checkpoint-{step}")
    message = refused()
    assert message.index("checkpoint-9") < message.index("checkpoint-50")
    assert message.index("checkpoint-50") < message.index("checkpoint-100")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_git_lfs_pointer(name):
    (site() / name).write_text(POINTER)
    message = refused()
    assert name in message
    assert "Git LFS pointer" in message
    assert "git lfs pull" in message


def pickled():
    folder = site()
    tensors = flk.Adapter.load(folder).state_dict()
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return tensors


def test_a_pickle_is_read_on_request_only():
    tensors = pickled()
    assert "adapter_model.bin" in refused()
    found = flk.Adapter.load("site", pickled=True).state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("attacked"),)


def test_a_pickle_runs_no_code():
    pickled()
    torch.save({"a": Attack()}, "site/adapter_model.bin")
    assert "adapter_model.bin" in refused(pickled=True)
    assert not Path("attacked").exists()


def test_a_pickle_that_is_not_one():
    pickled()
    Path("site/adapter_model.bin").write_bytes(b"nothing of the kind")
    assert "adapter_model.bin holds more than tensors, or is damaged" in refused(pickled=True)


FOREIGN = {
    "kohya": (
        {"lora_unet_down_blocks_0.lora_down.weight": 0, "lora_te_text.lora_up.weight": 0},
        "pytorch_lora.safetensors",
        "kohya",
    ),
    "diffusers": (
        {"unet.down_blocks.0.to_q.lora_A.weight": 0},
        "pytorch_lora_weights.safetensors",
        "diffusers",
    ),
    "torchtune": ({"layers.0.attn.q_proj.lora_a.weight": 0}, "adapter_0.safetensors", "torchtune"),
    "a whole model": ({"model.embed_tokens.weight": 0}, "model.safetensors", "whole model"),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("beside_a_config", [True, False])
def test_files_of_other_programs_are_named(what, beside_a_config):
    keys, name, words = FOREIGN[what]
    folder = Path("site")
    folder.mkdir()
    save_file({key: torch.zeros(2, 2) for key in keys}, folder / name)
    if beside_a_config:
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    assert words in refused()


@pytest.mark.parametrize(
    ("start", "words"), [(b"GGUF", "GGUF"), (b"PK\x03\x04", "pickle"), (b"\x80\x02", "pickle")]
)
def test_other_contents_under_the_right_name(start, words):
    (site() / WEIGHTS).write_bytes(start + bytes(100))
    assert words in refused()


# mlx-lm: the conversion is exact

RANKS = st.integers(1, 6)


@given(RANKS, st.floats(-4, 40, allow_nan=False), st.integers(0, 99))
def test_mlx_folders_are_converted_exactly(tmp_path_factory, rank, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    folder = tmp_path_factory.mktemp("mlx")
    module, m, n = "model.layers.0.self_attn.q_proj", 7, 9
    a, b = (torch.randn(*size, generator=generator) for size in ((n, rank), (rank, m)))
    save_file({f"{module}.lora_a": a, f"{module}.lora_b": b}, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "model": "a-model", "num_layers": 1}
    config["lora_parameters"] = {"rank": rank, "scale": scale, "dropout": 0.0}
    (folder / CONFIG).write_text(json.dumps(config))
    adapter = flk.Adapter.load(folder)
    expected = scale * (a.double() @ b.double()).T
    torch.testing.assert_close(adapter.delta(module), expected, rtol=1e-12, atol=1e-12)
    adapter.save(folder / "peft")
    again = flk.Adapter.load(folder / "peft")
    torch.testing.assert_close(again.delta(module), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_mlx_folders_without_lora_are_refused(kind):
    folder = Path("site")
    folder.mkdir()
    save_file({"model.q.lora_a": torch.zeros(4, 2)}, folder / "adapters.safetensors")
    config = {"fine_tune_type": kind, "lora_parameters": {"scale": 2.0}}
    (folder / CONFIG).write_text(json.dumps(config))
    assert f"'{kind}'" in refused()
