"""Draws the README's pictures and the Hub's icon with the worker: at the defaults, with the
adapters in models/adapters, and with control. `python -m tools.readme_picture`"""

import base64
import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from sdxl_worker.inputs.control_maps import canny_map
from shapes.data import Scene, render
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
OUTLINED = Scene("triangle", "blue", "white", center_x=0.3, center_y=0.4, radius=0.25)
REFERENCE = Scene("ring", "black", "yellow", center_x=0.6, center_y=0.55, radius=0.25)
ICON_PROMPT = "a yellow star on a blue background"
SEED = 1


def main() -> None:
    for setting, folder in (
        ("LORA_DIR", "adapters"),
        ("CONTROLNET_DIR", "controlnets"),
        ("IP_ADAPTER_DIR", "ip-adapters"),
    ):
        os.environ[setting] = str(REPOSITORY / "models" / folder)
    pictures = [draw(prompt, SEED, {}) for prompt in PROMPTS]
    pictures += [draw(ADAPTED_PROMPT, SEED, job_input) for job_input in ADAPTED]
    pictures += _controlled()
    contact_sheet(pictures, columns=6).save(DOCS / "pictures.png", optimize=True)
    draw(ICON_PROMPT, SEED, {}).save(DOCS / "icon.png", optimize=True)


def _controlled() -> list[Image.Image]:
    """An outline and two pictures with it, a reference and one with that, one with both."""
    outlined, reference = (Image.fromarray(render(one, 128, 128)) for one in (OUTLINED, REFERENCE))
    controlnet = {"controlnet": [{"type": "canny", "image_url": _data_uri(outlined)}]}
    ip_adapter = {"ip_adapter": [{"image_url": _data_uri(reference)}]}
    return [
        canny_map(outlined),
        draw("a red shape on a white background", SEED, controlnet),
        draw("a cyan shape on a magenta background", SEED, controlnet),
        reference,
        draw("", SEED, ip_adapter),
        draw("", SEED, {**controlnet, **ip_adapter}),
    ]


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
