"""The benchmark program: suites of comparisons with named peers, and studies.

    python -m benchmarks.run                                  all everyday suites
    python -m benchmarks.run --suite flows                    one of them
    python -m benchmarks.run --suite gram --base HEAD~3       beside another revision, interleaved
    python -m benchmarks.run --suite all --results benchmarks/results
    python -m benchmarks.run --list

Outputs are checked against float64 first. If a check fails, no time is reported for that variant.
With --results the rows go to ``DIR/<device>/<suite>.json``; ``python -m benchmarks.figures`` makes
the figures, README's claims and docs/performance.md from these files.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

import fedlora_kernels as flk
from benchmarks.stand import results
from benchmarks.stand.device import Device, versions
from benchmarks.stand.revision import Revision, RevisionError
from benchmarks.stand.roofline import Roofline
from benchmarks.stand.sheet import Sheet, measure
from benchmarks.stand.suite import Make, Setting, Study, Suite, found, named

ANOTHER_PROCESS = 75
"""The exit status after which a new process can go on: an error of a kernel stays with its own."""

TINY_ROOFLINE = {"elements": 1 << 16, "size": 64}


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Measure, print, write.

    Returns:
        0; 1 where a check of this library's own failed; ``ANOTHER_PROCESS`` where the device
        stopped answering.
    """
    options = _parser().parse_args(arguments)
    console = console or Console()
    suites = found()
    if options.list:
        for suite in suites.values():
            console.print(f"{suite.name}{'' if suite.everyday else '  (when named)'}")
        return 0
    chosen = _chosen(suites, options.suite)
    if (options.file or options.resume) and len(chosen) != 1:
        raise SystemExit("--file and --resume belong to one --suite")
    if options.resume and options.file is None:
        raise SystemExit("--resume needs the --file to go on with")
    device = Device.use(options.device, options.threads)
    until = None if options.seconds is None else time.monotonic() + options.seconds
    status = 0
    with ExitStack() as stack:
        base = None
        if options.base is not None:
            try:
                base = stack.enter_context(Revision(options.base, device, options.tiny))
            except RevisionError as error:
                raise SystemExit(f"--base {options.base}: {error}") from error
        for suite in chosen:
            if isinstance(suite, Study):
                status |= _study(suite, device, options, console)
                continue
            file = options.file
            if file is None and options.results is not None:
                file = results.place(options.results, device, suite.name)
            text = options.file.with_suffix(".txt") if options.file else None
            if options.resume and file.is_file():
                sheet = Sheet.resumed(file, device, text)
            else:
                sheet = Sheet(suite.name, device, _roofline(device, options.tiny), file, text)
            _head(console, sheet)
            comparisons = _comparisons(suite, device, options.tiny, options.only)
            if not measure(suite, comparisons, sheet, until, base):
                return ANOTHER_PROCESS
            sheet.show(console)
            for line in suite.say(sheet.rows) if suite.say else ():
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            status |= int(sheet.failed)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite",
        action="append",
        default=[],
        metavar="NAME",
        help="a suite or study, several times if wanted; 'all' is everyday suites and studies",
    )
    parser.add_argument("--list", action="store_true", help="name the suites")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="comparisons, or parts of a study, whose name has one of these texts",
    )
    parser.add_argument(
        "--base", metavar="GITREF", help="build this revision of the library and measure it too"
    )
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument("--threads", type=int, help="CPU threads (2 on a CPU)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of the result files")
    parser.add_argument("--file", type=Path, help="write one suite's rows to this file instead")
    parser.add_argument("--seconds", type=float, help="after which no comparison begins")
    parser.add_argument("--resume", action="store_true", help="go on with --file")
    parser.add_argument("--tiny", action="store_true", help="small inputs, to rehearse")
    return parser


def _chosen(suites: Mapping[str, Suite | Study], asked: Sequence[str]) -> list[Suite | Study]:
    if unknown := [name for name in asked if name != "all" and name not in suites]:
        raise SystemExit(f"no suite {', '.join(unknown)}; there are: {', '.join(suites)}")
    if not asked:
        return [suite for suite in suites.values() if suite.everyday]
    wanted = {name for name in asked if name != "all"}
    if "all" in asked:
        wanted |= {
            name
            for name, suite in suites.items()
            if suite.everyday or (isinstance(suite, Study) and suite.published)
        }
    return [suite for name, suite in suites.items() if name in wanted]


def _comparisons(suite: Suite, device: Device, tiny: bool, only: Sequence[str]) -> dict[str, Make]:
    if tiny and suite.tiny is None:
        raise SystemExit(f"suite {suite.name} has no --tiny inputs")
    made = (suite.tiny if tiny and suite.tiny else suite.comparisons)(device)
    chosen = {label: make for label, make in made.items() if named(label, only)}
    if not chosen:
        raise SystemExit(
            f"suite {suite.name} has no comparison with {' or '.join(only)} in its label"
        )
    return chosen


def _roofline(device: Device, tiny: bool) -> Roofline:
    return Roofline.measure(device, **(TINY_ROOFLINE if tiny else {}))


def _study(study: Study, device: Device, options: argparse.Namespace, console: Console) -> int:
    if options.base is not None:
        raise SystemExit(f"--base compares suites; {study.name} is a study")
    roofline = _roofline(device, options.tiny)
    content = study.measure(Setting(device, roofline, options.tiny, console, options.only))
    refused = content.pop("failed")
    if options.results is not None:
        document = results.document(study.name, device, roofline, content)
        console.print(f"written: {results.write(options.results, device, document)}")
    return int(refused)


def _head(console: Console, sheet: Sheet) -> None:
    device, roofline = sheet.device, sheet.roofline
    console.print(
        f"{sheet.suite}: {device.model}, {device.threads} threads, backend {flk.backend()}, torch "
        f"{versions()['torch']}: copy {roofline.copy_bytes_per_second / 1e9:.1f} GB/s, GEMM "
        f"{roofline.fp64_flops_per_second / 1e9:.0f} (fp64) and "
        f"{roofline.fp32_flops_per_second / 1e9:.0f} (fp32) GFLOP/s. ratio: time over that of the "
        "block's first row; error: worst of the row's checks"
    )


if __name__ == "__main__":
    sys.exit(main())
