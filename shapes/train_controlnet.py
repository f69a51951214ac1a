"""Trains the miniature's ControlNet: `python -m shapes.train_controlnet --out models/controlnets`.

Half an hour of one CPU core; all that is needed is the model itself, in models/shapes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from shapes import controlnet_training

SEED = 0


def main() -> None:
    """Train and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for outline/")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/shapes"),
        help="folder with base/ (default: %(default)s)",
    )
    parser.add_argument(
        "--first-stage",
        type=int,
        choices=range(len(controlnet_training.STAGES)),
        default=0,
        help="go on from the file that the stage before it wrote (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    controlnet_training.train(arguments.model, arguments.out, SEED, arguments.first_stage)
    print(f"outline: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
