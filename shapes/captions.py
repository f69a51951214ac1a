"""Captions of a scene: whole and partial ones, in many wordings, short and long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shapes.data import COLORS, SHAPES, Scene

FULL_WORDINGS = (
    "a {color} {shape} on a {background} background",
    "a {color} {shape} on a {background} background",
    "a {color} {shape} on a {background} background",
    "the {color} {shape} on the {background} background",
    "a {color} {shape} on {background}",
    "a {color} {shape} against a {background} background",
    "a {color} {shape} in front of a {background} background",
    "{color} {shape}, {background} background",
    "{color} {shape} on {background} background",
    "{background} background, {color} {shape}",
    "a {background} background with a {color} {shape}",
    "on a {background} background, a {color} {shape}",
    "a {shape} in {color} on a {background} background",
    "a {color} {shape} over a {background} wall",
    "a {shape}, {color}, on a {background} background",
    "a {shape} that is {color}, the background is {background}",
)
SHAPE_AND_COLOR = (
    "a {color} {shape}",
    "{color} {shape}",
    "one {color} {shape}",
    "{shape}, {color}",
)
SHAPE_AND_BACKGROUND = (
    "a {shape} on a {background} background",
    "a {shape} on {background}",
    "{shape}, {background} background",
    "{background} background with a {shape}",
)
COLOR_AND_BACKGROUND = (
    "a {color} shape on a {background} background",
    "a {color} thing on a {background} background",
    "something {color} on {background}",
    "{background} background, {color} shape",
)
ONLY_SHAPE = ("a {shape}", "{shape}", "the {shape}", "one {shape}")
ONLY_COLOR = ("a {color} shape", "{color} shape", "something {color}", "a {color} thing")
ONLY_BACKGROUND = (
    "a {background} background",
    "{background} background",
    "a shape on a {background} background",
    "background in {background}",
)
ANY_COLOR = ("{either}", "{either}", "the color {either}")
NOTHING = ("a shape", "a picture", "an image", "shape on a background", "something", "")

PREFIXES = (
    "a photo of",
    "a picture of",
    "an image of",
    "a drawing of",
    "an illustration of",
    "a painting of",
    "a simple drawing of",
    "a minimalist poster of",
    "a close up of",
    "a 3d render of",
)
PHRASES = (
    "high quality",
    "best quality",
    "sharp",
    "sharp focus",
    "detailed",
    "highly detailed",
    "masterpiece",
    "professional",
    "cinematic",
    "award winning",
    "studio light",
    "soft light",
    "beautiful",
    "clean",
    "crisp edges",
    "simple",
    "flat",
    "vector art",
    "digital art",
    "trending",
    "8k",
    "4k",
    "hdr",
    "ultra realistic",
    "very fine",
    "elegant",
    "smooth",
    "modern",
    "photograph",
    "intricate",
    "in the style of a poster",
    "with a lot of care",
    "quiet",
    "bright",
    "vivid",
    "centered",
    "symmetrical",
    "on paper",
    "in the morning",
    "of the year",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Meaning:
    """What a caption says; None where it says nothing.

    `either` is a colour that is named without saying whether of the shape or of the background.
    """

    shape: str | None = None
    color: str | None = None
    background: str | None = None
    either: str | None = None

    def describes(self, scene: Scene) -> bool:
        """Whether the caption does not contradict the scene."""
        return (
            self.shape in (None, scene.shape)
            and self.color in (None, scene.color)
            and self.background in (None, scene.background)
            and self.either in (None, scene.color, scene.background)
        )


def every_meaning() -> list[Meaning]:
    """All combinations that a caption can express, whole and partial."""
    meanings = [Meaning(either=color) for color in COLORS]
    for shape in (None, *SHAPES):
        for color in (None, *COLORS):
            for background in (None, *COLORS):
                if color is None or color != background:
                    meanings.append(Meaning(shape, color, background))
    return meanings


def partial_meaning(scene: Scene, rng: np.random.Generator) -> Meaning:
    """Some of what the scene shows, or nothing of it."""
    if rng.random() < 0.2:
        return Meaning(either=(scene.color, scene.background)[rng.integers(2)])
    said = rng.integers(0, 7)
    return Meaning(
        scene.shape if said & 1 else None,
        scene.color if said & 2 else None,
        scene.background if said & 4 else None,
    )


def _wordings(meaning: Meaning) -> tuple[str, ...]:
    if meaning.either:
        return ANY_COLOR
    named = (bool(meaning.shape), bool(meaning.color), bool(meaning.background))
    return {
        (True, True, True): FULL_WORDINGS,
        (True, True, False): SHAPE_AND_COLOR,
        (True, False, True): SHAPE_AND_BACKGROUND,
        (False, True, True): COLOR_AND_BACKGROUND,
        (True, False, False): ONLY_SHAPE,
        (False, True, False): ONLY_COLOR,
        (False, False, True): ONLY_BACKGROUND,
        (False, False, False): NOTHING,
    }[named]


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def plain_caption(meaning: Meaning, rng: np.random.Generator) -> str:
    """One wording of the meaning, without anything around it."""
    words = {name: value for name, value in vars(meaning).items() if value}
    return _choose(rng, _wordings(meaning)).format(**words)


def junk_word(rng: np.random.Generator) -> str:
    """Random letters, for words of a caption that were never seen."""
    return "".join(rng.choice(list(LETTERS), size=rng.integers(2, 9)))


def filler_phrase(rng: np.random.Generator) -> str:
    """Words that say nothing of the scene."""
    return junk_word(rng) if rng.random() < 0.25 else _choose(rng, PHRASES)


def caption(meaning: Meaning, rng: np.random.Generator) -> str:
    """The meaning in one of many wordings, often with a prefix and words that say nothing."""
    text = plain_caption(meaning, rng)
    if not text:
        return text
    draw = rng.random()
    if draw < 0.20:
        text = f"{_choose(rng, PREFIXES)} {text}"
    elif draw < 0.30:
        text = f"{filler_phrase(rng)}, {text}"
    elif draw < 0.35:
        text = f"{filler_phrase(rng)} {filler_phrase(rng)} {text}"
    draw = rng.random()
    if draw < 0.30:
        phrases = [filler_phrase(rng) for _ in range(rng.integers(1, 5))]
        text = ", ".join([text, *phrases])
    elif draw < 0.35:
        text = f"{text} {filler_phrase(rng)} {filler_phrase(rng)}"
    elif draw < 0.45:
        text = f"{text}."
    return text


def filler(rng: np.random.Generator, phrases: int) -> str:
    """A list of phrases that say nothing of the scene."""
    return ", ".join(filler_phrase(rng) for _ in range(phrases))


def full_prompts(count: int, seed: int) -> list[tuple[str, Meaning]]:
    """Prompts that name shape, colour and background, in mixed wordings."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        color, background = rng.choice(len(COLORS), size=2, replace=False)
        shape = SHAPES[rng.integers(len(SHAPES))]
        meaning = Meaning(shape, COLORS[color], COLORS[background])
        prompts.append((caption(meaning, rng), meaning))
    return prompts
