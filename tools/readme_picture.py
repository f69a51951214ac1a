"""Draws the README's pictures and the Hub's icon with the worker, at the defaults:
`python -m tools.readme_picture`."""

import asyncio
import base64
import io
from pathlib import Path

from PIL import Image

import handler
from shapes.sheet import contact_sheet

DOCS = Path(__file__).resolve().parent.parent / "docs"
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


ICON_PROMPT = "a yellow star on a blue background"


def draw(prompt: str) -> Image.Image:
    job = {"id": "picture", "input": {"prompt": prompt, "seed": 1}}
    output = asyncio.run(handler.handler(job))
    png = base64.b64decode(output["image_url"].partition(",")[2])
    return Image.open(io.BytesIO(png))


def main() -> None:
    sheet = contact_sheet([draw(prompt) for prompt in PROMPTS], columns=6)
    sheet.save(DOCS / "pictures.png", optimize=True)
    draw(ICON_PROMPT).save(DOCS / "icon.png", optimize=True)


if __name__ == "__main__":
    main()
