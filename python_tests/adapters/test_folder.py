"""Folders appear whole: a crash leaves the old one or the new one, an error leaves the old one."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from federation import draw

import fedlora_kernels as flk
from fedlora_kernels.adapters import adapter as adapter_module

KILLS = 20

CRASHES = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from safetensors import safe_open
import fedlora_kernels as flk

torch.set_num_threads(1)
target, kills = Path(sys.argv[1]), int(sys.argv[2])
chance = random.Random(4)

def version(v):
    b, a = torch.full((256, 16), float(v)), torch.full((16, 256), float(v))
    factors = {f"h.{i}.q": flk.Factors(b, a, 1.0) for i in range(12)}
    return flk.Adapter(factors, {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "version": v})

def check():
    names = sorted(entry.name for entry in target.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "card.md"], names
    config = json.loads((target / "adapter_config.json").read_text())
    with safe_open(target / "adapter_model.safetensors", "pt") as tensors:
        keys = list(tensors.keys())
        assert len(keys) == 24, len(keys)
        for key in keys:
            assert bool((tensors.get_tensor(key) == config["version"]).all()), key
    return config["version"]

version(0).save(target)
(target / "card.md").write_text("kept")
took = time.perf_counter()
version(1).save(target)
took = time.perf_counter() - took
check()
for attempt in range(kills):
    child = os.fork()
    if child == 0:
        for v in range(10 * attempt + 2, 10 * attempt + 500):
            version(v).save(target)
        os._exit(0)
    time.sleep(chance.uniform(0.2, 3.0) * took)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = [entry for entry in target.parent.iterdir() if entry != target]
    check()
    for entry in left:
        assert entry.name.startswith("." + target.name + "."), entry
        shutil.rmtree(entry)
# And at every step that touches files: the child dies just before its n-th one.
steps = old = new = 0
while True:
    before = check()
    child = os.fork()
    if child == 0:
        done = 0

        def die(event, arguments):
            global done
            if event == "open" or event.partition(".")[0] in ("os", "shutil", "tempfile"):
                done += 1
                if done > steps:
                    os.kill(os.getpid(), signal.SIGKILL)

        adapter = version(10_000 + steps)
        sys.addaudithook(die)
        adapter.save(target)
        os._exit(0)
    finished = os.waitpid(child, 0)[1] == 0
    after = check()
    assert after in (before, 10_000 + steps), (before, after, steps)
    old, new = old + (after == before), new + (after != before and not finished)
    for entry in target.parent.iterdir():
        if entry != target:
            shutil.rmtree(entry)
    if finished:
        break
    steps += 1
version(9999).save(target)
assert check() == 9999
assert [entry.name for entry in target.parent.iterdir()] == [target.name]
print(json.dumps({"steps": steps, "old": old, "new": new}))
"""


def test_killed_in_the_middle_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    """kill -9 at random moments and before every file operation: the folder is of one version."""
    place = tmp_path / "place"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(place / "global"), str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["old"] > 5, "no kill fell before the exchange"
    assert counts["new"] > 0, "no kill fell after the exchange"


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("rule", ["fedex", "fedsa", "flora"])
def test_exception_in_the_middle_leaves_the_old_folder(
    rule: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the last file."""
    target = tmp_path / "global"
    round_ = draw()
    if existing:
        round_.aggregate("fedit").save(target)
        (target / "README.md").write_text("a model card")
    before = listing(tmp_path)
    result = round_.aggregate(rule)
    files = {"fedex": 2, "fedsa": 4, "flora": 1}[rule]
    original, written = adapter_module.save_file, []

    def full(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        written.append(path)
        if len(written) == files:
            raise OSError(28, "No space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr(adapter_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        result.save(target)
    assert len(written) == files
    assert listing(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["global"] if existing else [])


@pytest.mark.parametrize("last", ["flora", "adapter"])
@pytest.mark.parametrize("first", ["fedex", "fedsa", "flexlora"])
def test_other_files_stay_and_what_the_old_result_wrote_disappears(
    first: str, last: str, tmp_path: Path
) -> None:
    target = tmp_path / "global"
    round_ = draw()
    round_.aggregate(first).save(target)
    assert (target / "residual").is_dir() == (first == "fedex")
    assert (target / "clients").is_dir() == (first != "fedex")
    (target / "README.md").write_text("a model card")
    (target / "tokenizer").mkdir()
    (target / "tokenizer" / "vocab.json").write_text("{}")
    (target / "adapter_model.bin").write_bytes(b"an older format")
    (target / "link").symlink_to("README.md")
    result = round_.aggregate("flora")
    if last == "flora":
        result.save(target)
    else:
        result.adapter.save(target)
    names = {path.name for path in target.iterdir()}
    kept = {"README.md", "tokenizer", "link"}
    report = {"report.json"} if last == "flora" else set()
    assert names == {"adapter_config.json", "adapter_model.safetensors"} | kept | report
    assert (target / "tokenizer" / "vocab.json").read_text() == "{}"
    assert (target / "link").is_symlink()
    again = flk.Adapter.load(target)
    for module in round_.modules:
        assert torch.equal(again.factors[module].b, result.adapter.factors[module].b)


def test_a_file_is_refused_and_stays(tmp_path: Path) -> None:
    target = tmp_path / "global"
    target.write_text("precious")
    with pytest.raises(FileExistsError, match="global is a file"):
        draw().aggregate("flora").save(target)
    assert target.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["global"]


def test_a_foreign_folder_is_refused_and_stays(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="thesis is not empty"):
        draw().adapters[0].save(target)
    assert listing(tmp_path) == {"thesis/chapter.tex": b"precious"}


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    adapter = draw().adapters[0]
    for target in (tmp_path / "empty", tmp_path / "runs" / "today" / "global"):
        adapter.save(target)
        assert flk.Adapter.load(target).factors.keys() == adapter.factors.keys()
        assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


def test_permissions_are_those_of_an_ordinary_folder(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    draw().adapters[0].save(tmp_path / "global")
    (tmp_path / "ordinary" / "file").touch()
    wanted = stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "global").stat().st_mode) == wanted
    wanted = stat.S_IMODE((tmp_path / "ordinary" / "file").stat().st_mode)
    for file in (tmp_path / "global").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == wanted, file


def test_a_link_to_a_folder_is_written_through(tmp_path: Path) -> None:
    """A link "latest" to run-3 stays a link, and run-3 holds the new adapter."""
    round_ = draw()
    round_.adapters[0].save(tmp_path / "run-3")
    (tmp_path / "latest").symlink_to("run-3")
    round_.adapters[1].save(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    written = flk.Adapter.load(tmp_path / "run-3")
    module = round_.modules[0]
    assert torch.equal(written.factors[module].b, round_.drawn[1][module].b)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "run-3"]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = draw().adapters[0]
    adapter.save("global/")
    adapter.save(Path("global"))
    assert flk.Adapter.load("global").name == "global"
    assert [path.name for path in tmp_path.iterdir()] == ["global"]
