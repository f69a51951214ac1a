"""The judge reads what a picture shows."""

import numpy as np
import pytest
from PIL import Image

from shapes.captions import Meaning
from shapes.data import COLORS, SHAPES, Scene, render
from shapes.judge import judge, parse_caption


@pytest.mark.parametrize("shape", SHAPES)
def test_the_judge_reads_what_was_drawn(shape: str) -> None:
    rng = np.random.default_rng(5)
    for size in ((128, 128), (96, 144), (64, 64), (256, 256)):
        for _ in range(6):
            color, background = rng.choice(len(COLORS), 2, replace=False)
            scene = Scene(shape, COLORS[color], COLORS[background], 0.5, 0.52, 0.3)
            seen = judge(Image.fromarray(render(scene, *size)))
            assert (seen.shape, seen.color, seen.background) == (
                shape,
                COLORS[color],
                COLORS[background],
            )
            assert seen.iou > 0.93
            assert seen.flat_distance < 1
            assert seen.matches(f"a {scene.color} {shape} on a {scene.background} background")


def test_the_judge_tells_what_is_wrong() -> None:
    picture = Image.fromarray(render(Scene("circle", "red", "blue", 0.5, 0.5, 0.3), 128, 128))
    seen = judge(picture)
    assert seen.matches("a red circle on a blue background")
    for wrong in (
        "a red square on a blue background",
        "a green circle on a blue background",
        "a red circle on a white background",
        "a blue circle on a red background",
    ):
        assert not seen.matches(wrong)
    assert not judge(Image.new("RGB", (128, 128), "blue")).matches("a red circle")
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    assert not judge(Image.fromarray(noise)).matches("a red circle on a blue background")
    assert (
        judge(picture.rotate(8, fillcolor=(40, 90, 220))).iou
        > judge(picture.resize((128, 60)).resize((128, 128)).crop((0, 0, 100, 128))).iou
    )


def test_captions_are_read() -> None:
    assert parse_caption("A photo of a RED circle on a blue background, sharp") == Meaning(
        "circle", "red", "blue"
    )
    assert parse_caption("a star") == Meaning("star", None, None)
    assert parse_caption("white background") == Meaning(None, None, "white")
