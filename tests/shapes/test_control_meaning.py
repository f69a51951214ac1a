"""Pictures stand where the outline is and look as the reference does, in every way of drawing.

Through the worker, with the embedded model's own ControlNet and IP-Adapters. All pictures of an
outline have other colours than the prompt asks for, a smaller shape than the base draws by itself,
and one further out, so that nothing is right by chance.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import handler
from sdxl_worker.serving.progress import Progress
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from shapes.data import PALETTE, Scene, render
from shapes.effects import dot_strength, judge_whole
from shapes.evaluate_adapters import loras
from shapes.judge import Judgement, judge
from tests.support import (
    data_uri,
    decoded,
    difference,
    largest_difference,
    picture,
    pictures,
    run,
)

FOLDER = EMBEDDED_MODEL_DIR.parent
BASE: dict[str, Any] = {"refiner_inference_steps": 0}
QUICK: dict[str, Any] = {**BASE, "num_inference_steps": 10}
EACH = 2
"""Pictures of each scene."""
NEAR = 0.06
"""Of a centre, in shares of the side."""

OUTLINES = (
    Scene("star", "green", "magenta", 0.32, 0.66, 0.20),
    Scene("ring", "red", "cyan", 0.66, 0.33, 0.24),
    Scene("triangle", "blue", "yellow", 0.30, 0.34, 0.22),
    Scene("square", "black", "white", 0.68, 0.66, 0.20),
)
WANTED = tuple(
    replace(scene, color=color, background=background)
    for scene, (color, background) in zip(
        OUTLINES,
        [("yellow", "blue"), ("white", "green"), ("magenta", "black"), ("red", "white")],
        strict=True,
    )
)
REFERENCES = tuple(replace(scene, center_x=0.5, center_y=0.5, radius=0.3) for scene in WANTED)
START = Image.fromarray(render(Scene("circle", "cyan", "red"), 128, 128))


def usual(scene: Scene) -> Scene:
    """Further in and larger, as the base draws."""
    x, y = ((0.5 + place) / 2 for place in (scene.center_x, scene.center_y))
    return replace(scene, center_x=x, center_y=y, radius=scene.radius + 0.08)


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLNET_DIR", str(FOLDER / "controlnets"))
    monkeypatch.setenv("IP_ADAPTER_DIR", str(FOLDER / "ip-adapters"))
    monkeypatch.setenv("LORA_DIR", str(FOLDER / "adapters"))


def uri(scene: Scene) -> str:
    return data_uri(Image.fromarray(render(scene, 128, 128)))


def edges(scene: Scene, **fields: Any) -> dict[str, Any]:
    """Of a job: the scene's picture, of which the worker makes edges."""
    return {"controlnet": [{"type": "canny", "image_url": uri(scene), **fields}]}


def look(scene: Scene, **fields: Any) -> dict[str, Any]:
    """Of a job: the scene's picture as a prompt."""
    return {"ip_adapter": [{"image_url": uri(scene), **fields}]}


def colors(scene: Scene) -> str:
    """A prompt that leaves the shape out."""
    return f"a {scene.color} shape on a {scene.background} background"


@dataclass(frozen=True)
class Shares:
    """Of some pictures, those that have their scene's shape, place, colours, and all of it."""

    shape: float
    place: float
    colors: float
    all: float


def shares(seen: list[tuple[Judgement, Scene]]) -> Shares:
    shape, place, colored = np.array(
        [
            (
                one.shape == scene.shape,
                np.abs(np.subtract(one.center, (scene.center_x, scene.center_y))).max() <= NEAR,
                (one.color, one.background) == (scene.color, scene.background),
            )
            for one, scene in seen
        ]
    ).T
    return Shares(
        shape=float(shape.mean()),
        place=float(place.mean()),
        colors=float(colored.mean()),
        all=float((shape & place & colored).mean()),
    )


def drawn(
    job: Callable[[Scene, Scene], dict[str, Any]],
    *,
    outlines: tuple[Scene, ...] = OUTLINES,
    wanted: tuple[Scene, ...] = WANTED,
) -> list[tuple[Image.Image, Scene]]:
    """Some pictures for each outline, whose job is made of it and of what is wanted."""
    made: list[tuple[Image.Image, Scene]] = []
    for i, (outline, scene) in enumerate(zip(outlines, wanted, strict=True)):
        asked = {"prompt": colors(scene), "seed": 10 * i, "num_images": EACH, **QUICK}
        made += [(one, scene) for one in pictures(**{**asked, **job(outline, scene)})]
    return made


def seen(*arguments: Any, **options: Any) -> Shares:
    return shares([(judge(image), scene) for image, scene in drawn(*arguments, **options)])


class TestOutlines:
    def test_the_shape_is_where_its_outline_is_in_the_prompt_s_colours(self) -> None:
        without = seen(lambda *_: {})
        assert without.colors >= 0.9
        assert max(without.shape, without.place) <= 0.4
        assert without.all == 0
        assert seen(lambda outline, _: edges(outline)).all >= 0.9

    def test_with_start_and_end_the_place_is_less_sure(self) -> None:
        """Half of the steps does not do where the base draws nothing by itself."""
        late = [seen(lambda outline, _, at=at: edges(outline, start=at)) for at in (0.5, 0.9)]
        assert [one.colors for one in late] == [1, 1]
        assert late[0].place <= 0.8
        assert late[1].place <= 0.2
        early = seen(lambda outline, _: edges(outline, end=0.2))
        assert 0.2 <= early.place <= 0.8

    def test_a_map_that_was_sent_back_draws_the_same_picture(self) -> None:
        job = {"prompt": colors(WANTED[0]), "seed": 1, **QUICK}
        output = run({**job, **edges(OUTLINES[0]), "return_maps": True})
        [edge_map] = output["maps"]
        assert decoded(edge_map).tobytes() != decoded(uri(OUTLINES[0])).tobytes()
        finished = {"type": "canny", "image_url": edge_map, "preprocess": False}
        again = picture(**job, controlnet=[finished])
        assert again.tobytes() == decoded(output["images"][0]).tobytes()

    def test_a_picture_is_redrawn_where_the_outline_is(self) -> None:
        job = {"image_url": data_uri(START), "mode": "img2img", "strength": 0.9}
        assert seen(lambda *_: job).place <= 0.2
        assert seen(lambda outline, _: {**job, **edges(outline)}).all >= 0.9

    def test_a_masked_part_is_repainted_where_the_outline_is_and_the_rest_stays(self) -> None:
        inside = np.zeros((128, 128), bool)
        inside[8:120, 8:120] = True
        job = {"image_url": data_uri(START), "mask_url": data_uri(Image.fromarray(inside))}
        on_red = tuple(replace(scene, color="yellow", background="red") for scene in WANTED)
        made = drawn(lambda outline, _: {**job, **edges(outline)}, wanted=on_red)
        assert shares([(judge(image), scene) for image, scene in made]).all >= 0.9
        for image, _ in made:
            assert np.array_equal(np.asarray(image)[~inside], np.asarray(START)[~inside])
        assert seen(lambda *_: job, wanted=on_red).place <= 0.2

    def test_a_lora_does_its_work_within_the_outline(self) -> None:
        """At half the scale: edges of which none is in the middle speak against a dot there.

        With shapes of sizes and in places that the LoRA has seen.
        """
        made = drawn(
            lambda outline, _: {**edges(outline, scale=0.5), **loras(dot=1)},
            outlines=tuple(map(usual, OUTLINES)),
            wanted=tuple(map(usual, WANTED)),
        )
        assert shares([(judge_whole(image), scene) for image, scene in made]).all >= 0.85
        dots = [dot_strength(image) for image, scene in made if scene.shape != "ring"]
        assert np.mean(dots) > 0.7

    def test_a_lora_of_few_steps_draws_where_the_outline_is(self) -> None:
        four = loras(few_step=1)
        made = drawn(
            lambda outline, _: {"num_inference_steps": 4, **four, **edges(outline)},
        )
        assert shares([(judge(image), scene) for image, scene in made]).all >= 0.9
        assert seen(lambda *_: {"num_inference_steps": 4, **four}).place <= 0.2

    def test_the_second_larger_pass_keeps_to_the_outline(self) -> None:
        larger = {"hires": {"scale": 1.25, "strength": 0.8}, "num_images": 1}
        made = drawn(lambda outline, _: {**larger, **edges(outline)})
        assert {image.size for image, _ in made} == {(160, 160)}
        assert shares([(judge(image), scene) for image, scene in made]).all == 1

    def test_the_refiner_goes_on_with_it(self) -> None:
        ensemble = {"high_noise_frac": 0.8, "num_images": 1}
        assert seen(lambda outline, _: {**ensemble, **edges(outline)}).all == 1


class TestReferences:
    @pytest.mark.parametrize("kind", ["plus", "plain"])
    def test_shape_and_colours_are_the_reference_s(self, kind: str) -> None:
        made = drawn(
            lambda _, reference: {"prompt": "", **look(reference, type=kind)}, wanted=REFERENCES
        )
        got = shares([(judge(image), scene) for image, scene in made])
        assert min(got.shape, got.colors) >= 0.9

    def test_without_it_they_are_not(self) -> None:
        got = seen(lambda *_: {"prompt": ""}, wanted=REFERENCES)
        assert got.colors <= 0.2
        assert got.shape <= 0.5

    @pytest.mark.parametrize("masked", ["left", "right"])
    def test_it_counts_where_its_mask_is_white(self, masked: str) -> None:
        mask = np.zeros((128, 128), bool)
        mask[:, :64] = masked == "left"
        mask[:, 64:] = masked == "right"
        masks = {"mask_url": data_uri(Image.fromarray(mask))}
        reference = Scene("circle", "yellow", "red")
        job = {"prompt": "a blue background", "seed": 3, "num_images": 4, **QUICK}
        for image in pictures(**job, **look(reference, type="plain", scale=1.5, **masks)):
            sides = [share_of("red", image, columns) for columns in (slice(16), slice(-16, None))]
            inside, outside = sides if masked == "left" else sides[::-1]
            assert inside > 0.7
            assert outside < 0.1

    def test_with_an_outline_the_look_is_one_s_and_the_place_the_other_s(self) -> None:
        got = seen(
            lambda outline, reference: {
                "prompt": "",
                **edges(outline),
                **look(replace(reference, center_x=0.5, center_y=0.5, radius=0.3)),
            }
        )
        assert got.all >= 0.85


def share_of(color: str, image: Image.Image, columns: slice) -> float:
    away = np.asarray(image, np.float32)[:, columns] - np.asarray(PALETTE[color], np.float32)
    return float((np.linalg.norm(away, axis=-1) < 60).mean())


SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4}
PLAIN: dict[str, Any] = {"prompt": "a star", "seed": 5, **BASE, **SMALL}
HALF = np.zeros((64, 64), bool)
HALF[:, 32:] = True
MASK = data_uri(Image.fromarray(HALF))
OUTLINE, REFERENCE = edges(OUTLINES[0]), look(REFERENCES[1])
BOTH = {**OUTLINE, **REFERENCE}
KINDS: dict[str, dict[str, Any]] = {
    "outline": OUTLINE,
    "two outlines": {
        "controlnet": [
            *edges(OUTLINES[0], end=0.5)["controlnet"],
            *edges(OUTLINES[1], type="softedge", preprocess=False, scale=0.5)["controlnet"],
        ]
    },
    "two references": {
        "ip_adapter": [
            *look(REFERENCES[0], mask_url=MASK)["ip_adapter"],
            *look(REFERENCES[1], type="style")["ip_adapter"],
        ]
    },
    "redrawn": {**BOTH, "image_url": data_uri(START), "mode": "img2img", "strength": 0.9},
    "repainted": {**BOTH, "image_url": data_uri(START), "mask_url": MASK},
    "LoRA": {**BOTH, **loras(dot=1, frame=0.5)},
    "few steps": {**BOTH, **loras(few_step=1)},
    "larger": {**BOTH, "hires": {"scale": 1.25, "strength": 0.8}},
    "ensemble": {**BOTH, "high_noise_frac": 0.5, "refiner_inference_steps": 4},
    "batch": {**BOTH, "num_images": 3, "scheduler": "K_EULER_ANCESTRAL"},
}


@pytest.mark.parametrize(
    "fields",
    [
        edges(OUTLINES[0], scale=0),
        look(REFERENCES[0], scale=0),
        {**edges(OUTLINES[0], scale=0), **look(REFERENCES[0], scale=0, type="plain")},
    ],
    ids=["outline", "reference", "both"],
)
def test_of_scale_0_the_picture_is_the_plain_one(fields: dict[str, Any]) -> None:
    assert picture(**PLAIN, **fields).tobytes() == picture(**PLAIN).tobytes()


def test_each_picture_of_a_batch_is_as_alone() -> None:
    job = {**PLAIN, **BOTH, "scheduler": "K_EULER_ANCESTRAL"}
    together = pictures(**{**job, "num_images": 3})
    for i, one in enumerate(together):
        assert largest_difference(one, picture(**{**job, "seed": job["seed"] + i})) <= 2
    assert difference(together[0], together[1]) > 0.5


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs a job that fails, or is cancelled, after some steps."""
    on_step = Progress.on_step
    left, how = 0, ""
    reached, cancelled = threading.Event(), threading.Event()

    def stepped(progress: Progress, *arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0 and how == "error":
            raise RuntimeError("odd")
        if left == 0 and how == "cancel":
            reached.set()
            assert cancelled.wait(60)
        on_step(progress, *arguments)

    monkeypatch.setattr(Progress, "on_step", stepped)

    async def cancel(job_input: dict[str, Any]) -> None:
        running = asyncio.create_task(handler.handler({"id": "a", "input": job_input}))
        assert await asyncio.to_thread(reached.wait, 60)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        cancelled.set()

    def interrupted(job_input: dict[str, Any], by: str, steps: int) -> None:
        nonlocal left, how
        left, how = steps, by
        reached.clear()
        cancelled.clear()
        if by == "cancel":
            asyncio.run(cancel(job_input))
        else:
            assert "error" in run(job_input)
        how = ""

    yield interrupted
    cancelled.set()


def test_nothing_stays_of_any_job_however_it_ends(interrupt: Callable[..., None]) -> None:
    """In random order, each kind once to its end and once interrupted."""
    plain = picture(**PLAIN).tobytes()
    rng = np.random.default_rng(17)
    ways = {kind: ("done", ("error", "cancel")[rng.integers(2)]) for kind in KINDS}
    jobs = [(kind, end) for kind, ends in ways.items() for end in ends]
    rng.shuffle(jobs)
    for kind, end in jobs:
        job_input = {**PLAIN, **KINDS[kind]}
        if end == "done":
            assert pictures(**job_input)[0].tobytes() != plain, kind
        else:
            interrupt(job_input, end, int(rng.integers(1, 4)))
        assert picture(**PLAIN).tobytes() == plain, f"{kind}: {end}"
