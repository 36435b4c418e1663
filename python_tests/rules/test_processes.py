"""aggregate over several processes: the bits of one process, its errors, what a loss becomes."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Drawn, client_config, draw, state, write, write_client
from group import ended, started

import fedlora_kernels as flk
from fedlora_kernels._processes import Processes

SIZES = {
    f"layers.{i}.{name}": size
    for i in range(3)
    for name, size in (("q", (24, 17)), ("down", (13, 40)), ("up", (40, 13)))
}


def clients(folder: Path, **options: Any) -> list[dict[str, Drawn]]:
    """Three clients' folders."""
    drawn = [dict(client) for client in draw(**{"sizes": SIZES, **options}).drawn]
    for k, client in enumerate(drawn):
        write_client(folder / str(k), client)
    return drawn


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    """Clients of all kinds, good and bad."""
    clients(tmp_path / "own")
    clients(tmp_path / "common", common_a=True)
    # Of odd matrices one behind the other, most do not begin on a cache line.
    clients(tmp_path / "odd" / "own", ranks=(3, 3, 3))
    clients(tmp_path / "odd" / "common", ranks=(3, 3, 3), common_a=True)
    clients(tmp_path / "absent", absent={1: ["layers.0.down"], 2: ["layers.1.q", "layers.2.q"]})
    clients(tmp_path / "one", sizes={"layers.0.q": (24, 17)})
    clients(tmp_path / "missing")
    (tmp_path / "missing" / "1" / "adapter_model.safetensors").unlink()
    drawn = clients(tmp_path / "nan")
    drawn[2]["layers.1.up"].a[0, 0] = torch.nan
    write_client(tmp_path / "nan" / "2", drawn[2])
    drawn = clients(tmp_path / "head")
    for k, client in enumerate(drawn):
        head = {"base_model.model.score.weight": torch.full((2, 3), torch.nan if k == 1 else 1.0)}
        fields = client_config(client, modules_to_save=["score"])
        write(tmp_path / "head" / str(k), {**state(client), **head}, fields)
    drawn = clients(tmp_path / "sizes")
    odd = drawn[1]["layers.2.q"]
    drawn[1]["layers.2.q"] = Drawn(odd.b[:20].contiguous(), odd.a, odd.scaling)
    write_client(tmp_path / "sizes" / "1", drawn[1])
    drawn = clients(tmp_path / "large")
    drawn[0]["layers.0.q"].b[0, 0] = 1e9
    write_client(tmp_path / "large" / "0", drawn[0])
    return tmp_path


SAID = {
    "nan": "AdapterError: client 2 ({}/nan/2), module layers.1.up: A holds NaN",
    "nan averaged": "AdapterError: client 2 ({}/nan/2), module layers.1.up: A holds NaN or Inf",
    "a head of nan": "AdapterError: client 1 ({}/head/1), tensor base_model.model.score.weight: ",
    "a missing file": "AdapterError: {}/missing/1",
    "another A": "AdapterError: client 1 ({}/own/1), module layers.",
    "neither is common": "AdapterError: client 1 ({}/own/1), module layers.0.down: ",
    "sizes": "AdapterError: client 1 ({}/sizes/1), module layers.2.q: the update is 20 x 17",
    "budget": "ValueError: rank_budget 1 is less than rank 1 for each of 9 modules",
    "option": "TypeError: rule 'florist' has no option 'color'",
    "overflow": "AdapterError: module layers.0.q: the aggregate overflows torch.float16",
    "one process has a problem": "AdapterError: {}/nobody",
}
"""How the message of each error begins, in all processes."""


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rule_gives_the_bits_of_one_process_and_every_error_is_that_of_all(
    size: int, folder: Path
) -> None:
    done = ended(started("group_rules.py", size, folder), within=300)
    assert [process.returncode for process in done] == [0] * size, done[0].stderr[-3000:]
    found = [json.loads(process.stdout) for process in done]
    for rank, one in enumerate(found):
        wrong = {what: differ for what, differ in one["differ"].items() if differ}
        assert not wrong, f"process {rank}: {wrong}"
        assert one["errors"] == found[0]["errors"]
    errors = found[0]["errors"]
    assert errors.keys() == SAID.keys()
    for what, begins in SAID.items():
        assert errors[what].startswith(begins.format(folder)), f"{what}: {errors[what]}"


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_lost_process_is_an_error_of_all_others(how: str, tmp_path: Path) -> None:
    """Killed, its connections end; stopped, the others wait for the group's timeout."""
    (tmp_path / "how").write_text(how, encoding="ascii")
    begin = time.monotonic()
    processes = started("group_lost.py", 3, tmp_path, timeout=120 if how == "killed" else 3)
    first, lost, last = processes
    done = ended([first, last], within=60)
    assert time.monotonic() - begin < 30 + 15  # and the start of three processes
    for process in done:
        assert process.returncode == 1, process.stderr
        assert "another process of the group ended, or did not answer" in process.stderr
    lost.kill()
    assert ended([lost], within=10)[0].returncode == -signal.SIGKILL


def test_each_process_reads_its_own_modules(tmp_path: Path) -> None:
    """Of two processes each touches about half of the files' pages, which may be of 2 MiB."""
    sizes = {f"layers.{i}.q": (8192, 8192) for i in range(8)}
    clients(tmp_path / "large", ranks=(64,), alphas=(64,), weights=(1,), sizes=sizes)
    done = ended(started("group_reading.py", 2, tmp_path), within=120)
    files = sum(path.stat().st_size for path in (tmp_path / "large").rglob("*.safetensors"))
    for process in done:
        assert process.returncode == 0, process.stderr[-3000:]
        assert 0.4 * files < int(process.stdout) < 0.7 * files


def test_shares_are_even_and_cover_all() -> None:
    """No process has more than its part and one module, and shares are runs of names."""
    costs = {f"m{i}": float(1 + i % 7) ** 3 for i in range(50)}
    shares = []
    for rank in range(4):
        processes = Processes()
        processes.rank, processes.size = rank, 4
        shares.append(processes.share(costs))
    assert sorted(name for share in shares for name in share) == sorted(costs)
    loads = [sum(costs[name] for name in share) for share in shares]
    assert max(loads) <= sum(loads) / 4 + max(costs.values())
    assert [name for share in shares for name in sorted(share)] == sorted(costs)
    assert Processes().share(costs) == set(costs)


def test_folders_in_the_place_of_adapters(tmp_path: Path) -> None:
    clients(tmp_path)
    folders = [tmp_path / str(k) for k in range(3)]
    result = flk.aggregate(folders, rule="fedit")
    expected = flk.aggregate([flk.Adapter.load(path) for path in folders], rule="fedit")
    ours, theirs = result.adapter.state_dict(), expected.adapter.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_numbers_that_were_not_looked_at_are_found_by_the_rule(tmp_path: Path) -> None:
    drawn = clients(tmp_path)
    drawn[1]["layers.2.up"].b[1, 1] = torch.inf
    write_client(tmp_path / "1", drawn[1])
    with pytest.raises(flk.AdapterError, match=r"module layers\.2\.up\.lora_B"):
        flk.Adapter.load(tmp_path / "1")
    loaded = [flk.Adapter.load(tmp_path / str(k), numbers=False) for k in range(3)]
    for rule in ("fedit", "florist", "flora", "fedsa"):
        with pytest.raises(flk.AdapterError, match=r"client 1 .*, module layers\.2\.up: B holds"):
            flk.aggregate(loaded, rule=rule)
