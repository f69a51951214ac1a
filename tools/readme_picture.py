"""Draws the README's pictures and the Hub's icon with the worker: at the defaults, and with the
adapters in models/adapters. `python -m tools.readme_picture`"""

import os
from pathlib import Path
from typing import Any

from shapes.evaluate_adapters import draw, loras
from shapes.sheet import contact_sheet

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PROMPTS = (
    "a red circle on a blue background",
    "a yellow star on a black background",
    "a green square on a white background",
    "a magenta triangle on a yellow background",
    "a white ring on a red background",
    "a cyan star on a magenta background",
    "a black square on a cyan background",
    "a blue ring on a yellow background",
    "a white triangle on a green background",
    "a red star on a white background",
    "a yellow circle on a magenta background",
    "a green triangle on a black background",
)

ADAPTED_PROMPT = "a white square on a green background"
ADAPTED: tuple[dict[str, Any], ...] = (
    {},
    loras(dot=0.5),
    loras(dot=1),
    loras(frame=1),
    loras(dot=1, frame=1),
    loras(few_step=1),
)
ICON_PROMPT = "a yellow star on a blue background"
SEED = 1


def main() -> None:
    os.environ["LORA_DIR"] = str(REPOSITORY / "models" / "adapters")
    pictures = [draw(prompt, SEED, {}) for prompt in PROMPTS]
    pictures += [draw(ADAPTED_PROMPT, SEED, job_input) for job_input in ADAPTED]
    contact_sheet(pictures, columns=6).save(DOCS / "pictures.png", optimize=True)
    draw(ICON_PROMPT, SEED, {}).save(DOCS / "icon.png", optimize=True)


if __name__ == "__main__":
    main()
