"""What the benchmarks share: the machine they ran on, CSV files, charts."""

import csv
import datetime
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS_DIR = Path(__file__).resolve().parent / "results"
LIBRARIES = ("torch", "diffusers", "transformers", "torchao")


def machine(device: str = "cpu") -> dict[str, object]:
    """Columns that every row of every CSV begins with: when and on what it was measured.

    Args:
        device: "cuda" or "cpu".
    """
    on_gpu = device == "cuda"
    cores = os.cpu_count()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": _gpu("name") if on_gpu else cpu_name(),
        "driver": _gpu("driver_version") if on_gpu else "",
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS") or cores,
        "python": platform.python_version(),
        **{library: _version(library) for library in LIBRARIES},
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def slug(text: object) -> str:
    """For a file name: "NVIDIA H100 80GB" becomes "nvidia-h100-80gb"."""
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")


class CsvFile:
    """A CSV that is complete after each row: a run that is cut off keeps what it has."""

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.path = path
        self._columns = list(columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.DictWriter(file, self._columns).writeheader()

    def add(self, row: Mapping[str, object]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bar_chart(
    path: Path,
    title: str,
    unit: str,
    labels: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    target: float | None = None,
) -> None:
    """One horizontal bar for each label, of one or more parts, as a small PNG.

    Where matplotlib is missing, as on a borrowed GPU machine, it says so and makes none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    figure = Figure(figsize=(7, 1.4 + 0.3 * len(labels)), dpi=100, layout="constrained")
    axes = figure.subplots()
    ends = [0.0] * len(labels)
    for name, values in parts.items():
        axes.barh(labels, values, left=ends, label=name)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    for row, end in enumerate(ends):
        axes.text(end, row, f" {end:.0f}" if end >= 100 else f" {end:.3g}", va="center", fontsize=8)
    if target is not None:
        axes.axvline(target, color="black", linestyle="--", linewidth=1, label="target")
    axes.set(title=title, xlabel=unit)
    axes.set_xlim(0, 1.12 * max(ends))
    axes.invert_yaxis()
    if len(parts) > 1 or target is not None:
        figure.legend(loc="outside lower center", ncols=len(parts) + 1, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def shortened(error: BaseException) -> str:
    """Of an error, for a row's note."""
    first, *_ = str(error).strip().split("\n")
    return f"{type(error).__name__}: {first[:200]}"


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """The first row holds the column names."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _gpu(field: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    first, *_ = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    return first.strip()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
