"""Results: one JSON file per suite, with the device, the versions and the roofline of its run."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fedlora_kernels as flk
from fedlora_kernels.bench.device import Device, versions
from fedlora_kernels.bench.measure import Row
from fedlora_kernels.bench.roofline import Roofline

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


def write(folder: Path, device: Device, found: Mapping[str, Any]) -> Path:
    """Write ``folder/<device>/<suite>.json``; numbers keep six significant digits."""
    path = folder / device.folder / f"{found['suite']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_short(found), indent=1) + "\n", encoding="utf-8")
    return path


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
