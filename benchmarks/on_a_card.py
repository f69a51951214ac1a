"""All that is to be measured on a card that is at hand for some minutes, the most important first.

Two plans of six minutes. Each is a list of this folder's commands with a limit of seconds each: one
that fails or is cut off costs the others nothing, and a plan ends in time. What they print is in
`log.txt` in the folder of the results, and its end is shown here. README.md says what each figure
decides.

    python -m benchmarks.on_a_card first --out results/first
    python -m benchmarks.on_a_card second --out results/second

On a CPU the steps run with the embedded model: to see that they do.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import common
from sdxl_worker.gpu import gpu_is_there

MINUTES = 6.0
LINES_SHOWN = 18
# A step that has less than this is not begun: it would only import libraries.
LEAST_SECONDS = 15

# In the order of worth: each row is written when it is measured.
LOSSLESS_ROWS = (
    *("worker", "channels_last", "direct_attention", "graphs", "2.1.0"),
    *("fp16_accumulation", "flash_attention", "fuse_qkv", "diffusers"),
)
COMPILED_ROWS = ("blocks", "blocks+fp8", "blocks+int8", "full")


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    """A module of this project and its arguments."""
    limit_s: int
    environment: Mapping[str, str] = field(default_factory=dict)


def first_plan(out: Path, model_dir: Path | None, newer: Path | None) -> list[Step]:
    """Does it work at all, what does a start take, and what bounds a pass?

    Args:
        model_dir: where a full-size model is to be written. None: the embedded one is measured.
        newer: a folder with a newer safetensors to read with.
    """
    to = ("--out", str(out))
    of_model = {"MODEL_DIR": str(model_dir)} if model_dir else {}
    paths = [str(newer)] if newer else []
    path = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    weights = ("benchmarks.full_size_model", "--out", str(model_dir))
    only = ("graphs", "waits", "float16", "bfloat16", "offloading")
    # Beside those that were written before.
    blocks = ("--only", "blocks", "--out", str(out / "blocks"))
    return [
        *([Step("weights", weights, 90)] if model_dir else []),
        Step("checks", ("benchmarks.card_checks", "--only", *only, *to), 90),
        Step("start", ("benchmarks.start_without_sdk", "--repeats", "1", *to), 130, of_model),
        Step("passes", ("benchmarks.passes", *to), 60),
        Step("reading", ("benchmarks.ways_to_read", *to), 90, {**of_model, "PYTHONPATH": path}),
        Step("blocks", ("benchmarks.card_checks", *blocks), 90),
        Step("company", ("benchmarks.rounding", "--parts", "company", "--mixes", "5"), 60),
    ]


def second_plan(out: Path) -> list[Step]:
    """What each optimization gives."""

    def pictures(name: str, rows: Sequence[str], *options: str) -> tuple[str, ...]:
        to = ("--out", str(out / name))
        return ("benchmarks.pictures", *options, "--rows", *rows, *to)

    one, eight = ("--batch", "1", "--repeats", "2"), ("--batch", "8", "--quick")
    return [
        Step("lossless", pictures("lossless", LOSSLESS_ROWS, *one), 190),
        Step("compiled", pictures("compiled", COMPILED_ROWS, *one), 150),
        Step("eight", pictures("eight", ("channels_last", "graphs"), *eight), 60),
    ]


def run_step(step: Step, limit_s: float, log: Path) -> str:
    """Run one step, and show the end of what it printed.

    Returns:
        How it ended.
    """
    print(f"\n=== {step.name}: {' '.join(step.command)}", flush=True)
    started = time.monotonic()
    variables = {"PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("ab") as file:
        file.write(f"\n=== {step.name}: {' '.join(step.command)}\n".encode())
        file.flush()
        begin = file.tell()
        # A group of its own: compilers and workers that it began end with it.
        process = subprocess.Popen(
            [sys.executable, "-m", *step.command],
            env={**os.environ, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            status = process.wait(limit_s)
            ended = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ended = "cut off"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    ended = f"{ended} after {time.monotonic() - started:.0f} s"
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    print("\n".join(line[:300] for line in lines[-LINES_SHOWN:]))
    print(f"=== {step.name}: {ended}", flush=True)
    with log.open("a") as file:
        file.write(f"=== {step.name}: {ended}\n")
    return ended


def run(steps: Sequence[Step], out: Path, minutes: float) -> dict[str, str]:
    """All steps, as far as the time allows.

    Returns:
        How each ended, by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    ends = {}
    for step in steps:
        left_s = deadline - time.monotonic()
        if left_s < min(LEAST_SECONDS, step.limit_s):
            ends[step.name] = "no time left"
        else:
            ends[step.name] = run_step(step, min(step.limit_s, left_s), out / "log.txt")
    print(common.markdown_table([("step", "end"), *ends.items()]), flush=True)
    return ends


@contextlib.contextmanager
def _room_for_a_model() -> Iterator[Path | None]:
    """Where a full-size model can be written; None where the embedded one is to be measured."""
    if not gpu_is_there():
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "sdxl"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", choices=("first", "second"))
    parser.add_argument("--out", type=Path, required=True, help="a folder for all results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"default: {MINUTES:.0f}")
    parser.add_argument(
        "--newer-safetensors", type=Path, metavar="FOLDER", help="to read with, in the first plan"
    )
    arguments = parser.parse_args()

    out = arguments.out.resolve()
    with _room_for_a_model() as room:
        if arguments.plan == "first":
            steps = first_plan(out, room, arguments.newer_safetensors)
        else:
            steps = second_plan(out)
        ends = run(steps, out, arguments.minutes)
    sys.exit(0 if all(end.startswith("done") for end in ends.values()) else 1)


if __name__ == "__main__":
    main()
