"""Results: one JSON file per suite, with the device, the versions and the roofline of its run."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fedlora_kernels as flk
from benchmarks.stand.device import Device, versions
from benchmarks.stand.measure import Row
from benchmarks.stand.roofline import Roofline

SCHEMA = 1

_DIGITS = 6


def document(
    suite: str, device: Device, roofline: Roofline, content: Mapping[str, Any]
) -> dict[str, Any]:
    """A suite's content under the head that every result file has."""
    return {
        "schema": SCHEMA,
        "suite": suite,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "backend": flk.backend(),
        "device": device.describe(),
        "versions": versions(),
        "roofline": {
            "copy_bytes_per_second": roofline.copy_bytes_per_second,
            "fp64_flops_per_second": roofline.fp64_flops_per_second,
            "fp32_flops_per_second": roofline.fp32_flops_per_second,
        },
        **content,
    }


def of_rows(suite: str, device: Device, roofline: Roofline, rows: Sequence[Row]) -> dict[str, Any]:
    """The document of measured rows."""
    return document(suite, device, roofline, {"rows": [row.as_dict() for row in rows]})


def place(folder: Path, device: Device, suite: str) -> Path:
    """Where a suite's result file lies."""
    return folder / device.folder / f"{suite}.json"


def write(folder: Path, device: Device, found: Mapping[str, Any]) -> Path:
    """Write ``folder/<device>/<suite>.json``."""
    path = place(folder, device, str(found["suite"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, text(found))
    return path


def text(found: Mapping[str, Any]) -> str:
    """The JSON of a document; numbers keep six significant digits."""
    return json.dumps(_short(found), indent=1) + "\n"


def replace(file: Path, content: str) -> None:
    """Write a file that is whole at any moment: under another name first."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(content, encoding="utf-8")
    new.replace(file)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """All result files of one device: suite -> document.

    Raises:
        ValueError: a file has another schema.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA:
            raise ValueError(f"{path.name} has schema {content.get('schema')}, expected {SCHEMA}")
        found[str(content["suite"])] = content
    return found


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return value
