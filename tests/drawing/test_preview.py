"""Small pictures of unfinished ones."""

import io

import pytest
import torch
from PIL import Image

from sdxl_worker.drawing.preview import MAX_PREVIEW_BYTES, preview_jpeg
from sdxl_worker.loading.latent_rgb import LatentRgb
from sdxl_worker.request import parse_request
from tests.support import PROMPT, difference, draw, models


@pytest.mark.parametrize("scheduler", ["DDIM", "K_EULER"])
def test_a_late_preview_looks_like_the_picture(scheduler: str) -> None:
    job_input = {"prompt": PROMPT, "seed": 1, "scheduler": scheduler, "refiner_inference_steps": 0}
    request = parse_request(job_input)
    latents: list[torch.Tensor] = []
    [final] = draw(request, models(), None, lambda one: latents.append(one.latents()))
    jpeg = preview_jpeg(latents[-1], models().latent_rgb)
    preview = Image.open(io.BytesIO(jpeg))
    assert preview.format == "JPEG"
    small = final.resize(preview.size, Image.Resampling.BOX)
    assert difference(preview.convert("RGB"), small) < 25
    first = Image.open(io.BytesIO(preview_jpeg(latents[0], models().latent_rgb)))
    assert difference(first.convert("RGB"), small) > difference(preview.convert("RGB"), small)


def test_a_preview_is_at_most_20_kb_whatever_the_latents() -> None:
    torch.manual_seed(0)
    latent_rgb = LatentRgb(torch.randn(4, 3), torch.zeros(3))
    for shape in ((1, 4, 256, 256), (8, 4, 8, 256), (2, 4, 128, 128)):
        jpeg = preview_jpeg(10 * torch.randn(shape), latent_rgb)
        assert len(jpeg) <= MAX_PREVIEW_BYTES
        assert max(Image.open(io.BytesIO(jpeg)).size) <= 256
