"""Trains the miniature SDXL from nothing: `python -m shapes.train --out models/shapes`.

Two hours of one CPU core; no downloads. Every phase leaves its result in the work folder and is
skipped when that is there; the two longest also leave checkpoints. Phases that do not depend on
each other ("decoder" and "base", "base" and "refiner") can run side by side, each with --only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from shapes import text_training, tokenizer, unet_training, vae_training
from shapes.export import export

SEED = 0

# The phase's name, what it leaves in the work folder, and what runs it.
PHASES: tuple[tuple[str, str, Callable[[Path], None]], ...] = (
    ("tokenizer", "tokenizer_2", lambda work: tokenizer.write_tokenizers(work, SEED)),
    ("text", "text.pt", lambda work: text_training.train(work, SEED)),
    ("vae", "vae-joint.pt", lambda work: vae_training.train_joint(work, SEED)),
    ("prepare", "prepared.pt", lambda work: unet_training.prepare(work, SEED)),
    ("decoder", "vae.pt", lambda work: vae_training.train_decoder(work, SEED)),
    ("base", "base.pt", lambda work: unet_training.train("base", work, SEED)),
    ("refiner", "refiner.pt", lambda work: unet_training.train("refiner", work, SEED)),
)


def main() -> None:
    """Run the phases that are still to do, then write the model."""
    names = [name for name, _, _ in PHASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder that base/ and refiner/ are written to")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/shapes"),
        help="folder of what the phases leave (default: %(default)s)",
    )
    parser.add_argument("--only", choices=names, help="run this one phase, and write no model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.out and not arguments.only:
        parser.error("give --out, or --only for a single phase")

    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, result, run in PHASES:
        wanted = arguments.only in (None, name)
        if wanted and not (arguments.work / result).exists():
            run(arguments.work)
    if not arguments.only:
        export(arguments.work, arguments.out, SEED)


if __name__ == "__main__":
    main()
