"""Trains the miniature's IP-Adapters: `python -m shapes.train_ip_adapter --out models/ip-adapters`.

Half an hour of one CPU core; all that is needed is the model itself, in models/shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shapes import image_encoder_training, ip_adapter_training

SEED = 0

PARTS: dict[str, Callable[[Path, Path, int], None]] = {
    "encoder": lambda _, out, seed: image_encoder_training.train(out, seed),
    "plain": lambda model, out, seed: ip_adapter_training.train("plain", model, out, seed),
    "plus": lambda model, out, seed: ip_adapter_training.train("plus", model, out, seed),
}


def main() -> None:
    """Train all, or one on the encoder that is there, and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of encoder and adapters")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/shapes"),
        help="folder with base/ (default: %(default)s)",
    )
    parser.add_argument("--only", choices=PARTS, help="train this one")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, train in PARTS.items():
        if arguments.only in (None, name):
            started = time.perf_counter()
            train(arguments.model, arguments.out, SEED)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
