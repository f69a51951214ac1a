"""Trains the adapters of the miniature: `python -m shapes.train_adapters --out models/adapters`.

An hour of one CPU core that is shared; all that is needed is the model itself, in models/shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shapes import effect_training, few_step_training

SEED = 0

ADAPTERS: dict[str, Callable[[Path, Path, int], None]] = {
    "dot": lambda model, out, seed: effect_training.train(effect_training.DOT, model, out, seed),
    "frame": lambda model, out, seed: effect_training.train(
        effect_training.FRAME, model, out, seed
    ),
    "few-step": few_step_training.train,
}


def main() -> None:
    """Train all, or one, and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapters' files")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/shapes"),
        help="folder with base/ (default: %(default)s)",
    )
    parser.add_argument("--only", choices=ADAPTERS, help="train this one")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, train in ADAPTERS.items():
        if arguments.only in (None, name):
            started = time.perf_counter()
            train(arguments.model, arguments.out, SEED)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
