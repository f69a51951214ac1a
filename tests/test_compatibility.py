"""Requests that worker-sdxl 2.1.0 answered with pictures: taken here, or refused in words that say
what to send instead. docs/upgrade.md tells the second kind, and what is answered otherwise.
"""

import json
import re
from typing import Any

import pytest

from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import MAX_PROMPT_CHARACTERS
from sdxl_worker.request import REDRAW_STRENGTH, Request, parse_request
from tests.support import PROMPT, REPOSITORY, SCHEDULERS, models, run

PICTURE = {"image_url": "https://example.com/a.png"}
UPGRADE = REPOSITORY / "docs" / "upgrade.md"

# By what is sent: the steps of each stage.
TAKEN: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [25, 15]),
    # PNDM repeats the first step of a whole schedule.
    *(({"scheduler": name}, [25 + (name == "PNDM"), 15]) for name in SCHEDULERS),
    ({"num_inference_steps": 1}, [1, 15]),
    ({"num_inference_steps": 151}, [151, 15]),
    ({"num_inference_steps": 1000}, [1000, 15]),
    ({"refiner_inference_steps": 1000}, [25, 300]),
    ({"refiner_inference_steps": 50, "strength": 1}, [25, 50]),
    ({"refiner_inference_steps": 50, "strength": 1.0}, [25, 50]),
    ({"height": 64, "width": 64}, [25, 15]),
    ({"height": 2056, "width": 4096}, [25, 15]),
    ({"height": 0, "width": 0}, [25, 15]),
    ({"guidance_scale": 0}, [25, 15]),
    ({"guidance_scale": 7}, [25, 15]),
    ({"guidance_scale": 30.5}, [25, 15]),
    ({"guidance_scale": 100}, [25, 15]),
    ({"high_noise_frac": 0.8}, [20, 5]),
    ({"high_noise_frac": 0.8, "strength": 0.3, "refiner_inference_steps": 50}, [20, 5]),
    ({"high_noise_frac": None}, [25, 15]),
    ({"high_noise_frac": 0}, [25, 15]),
    ({"high_noise_frac": 0.0}, [25, 15]),
    ({"high_noise_frac": 1}, [25, 15]),
    ({"high_noise_frac": 1.0}, [25, 15]),
    ({"seed": None}, [25, 15]),
    ({"seed": -1}, [25, 15]),
    ({"seed": 0}, [25, 15]),
    ({"seed": 2**53}, [25, 15]),
    ({"seed": 2**64 - 1}, [25, 15]),
    ({"num_images": 2}, [25, 15]),
    ({"num_images": 9}, [25, 15]),
    ({"num_images": 16}, [25, 15]),
    ({"prompt": ""}, [25, 15]),
    ({"prompt": "a cat " * 3000}, [25, 15]),
    ({"negative_prompt": None}, [25, 15]),
    ({"negative_prompt": ""}, [25, 15]),
    ({"negative_prompt": "blurry"}, [25, 15]),
    ({"image_url": None}, [25, 15]),
    ({"image_url": ""}, [25, 15]),
    (PICTURE, [15]),
    (PICTURE | {"strength": 0.5}, [25]),
    (PICTURE | {"height": 1024, "width": 1024}, [15]),
    (PICTURE | {"height": 0, "width": 0}, [15]),
    (PICTURE | {"num_images": 2, "num_inference_steps": 1000}, [15]),
    (PICTURE | {"high_noise_frac": 0.8, "guidance_scale": 100}, [15]),
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_inference_steps": 1001}, "num_inference_steps: must be an integer from 1 to 1000"),
    ({"height": 32}, "height: must be an integer from 64 to 4096, a multiple of 8; got 32"),
    ({"width": 4104}, "width: must be an integer from 64 to 4096, a multiple of 8; got 4104"),
    (
        {"guidance_scale": -1},
        "guidance_scale: must be a number from 0 to 100 (1 turns guidance off); got -1",
    ),
    ({"guidance_scale": 101}, "guidance_scale: must be a number from 0 to 100"),
    (
        {"high_noise_frac": 1.5},
        "high_noise_frac: must be a number from 0 to 1 (0 and 1 turn it off); got 1.5",
    ),
    ({"high_noise_frac": -0.5}, "high_noise_frac: must be a number from 0 to 1 (0 and 1 turn"),
    ({"seed": -2}, "seed: must be an integer from -1 to 18446744073709551615; got -2"),
    ({"num_images": 17}, "num_images: must be an integer from 1 to 16; got 17"),
    ({"num_images": True}, "num_images: must be an integer from 1 to 16; got true"),
    ({"guidance_scale": True}, "guidance_scale: must be a number from 0 to 100"),
    (
        {"prompt": "a" * (MAX_PROMPT_CHARACTERS + 1)},
        "prompt: must be a string of at most 20000 characters; got a string of 20001 characters",
    ),
    ({"negative_prompt": "a" * 20001}, "negative_prompt: must be a string of at most 20000"),
    (
        {"image_url": "/app/test_input.png"},
        "image_url: must be an http:// or https:// address, or a data:image/ URI",
    ),
]


def parsed(sent: dict[str, Any]) -> Request:
    return parse_request({"prompt": PROMPT, **sent})


def short(value: object) -> str:
    return str(value)[:60]


@pytest.mark.parametrize(("sent", "steps"), TAKEN, ids=short)
def test_what_2_1_0_took_is_taken(sent: dict[str, Any], steps: list[int]) -> None:
    assert [stage.steps for stage in plan_stages(parsed(sent), models())] == steps


@pytest.mark.parametrize(("sent", "message"), REFUSED, ids=short)
def test_what_is_no_longer_taken_is_told_what_to_send(sent: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parsed(sent)
    assert str(caught.value).startswith(message)


def test_fields_that_2_1_0_did_not_have_change_nothing_when_they_are_not_sent() -> None:
    """`strength` is the one whose default depends on a new field."""
    request = parsed({"seed": 1, **PICTURE})
    assert request.mode is None
    assert request.strength == 0.3
    assert parsed({"mode": "img2img", **PICTURE}).strength == REDRAW_STRENGTH


SMALL = {"prompt": PROMPT, "width": 64, "height": 64, "refiner_inference_steps": 0}


@pytest.mark.parametrize(
    ("sent", "count"),
    [
        ({"num_inference_steps": 2, "seed": 2**64 - 1, "num_images": 2}, 2),
        ({"num_inference_steps": 1, "num_images": 16}, 16),
        ({"num_inference_steps": 2, "guidance_scale": 100}, 1),
        ({"num_inference_steps": 2, "height": 0, "width": 0}, 1),
    ],
    ids=short,
)
def test_what_was_refused_for_a_while_is_drawn(sent: dict[str, Any], count: int) -> None:
    output = run(SMALL | sent)
    assert "error" not in output, output["error"]
    assert len(output["images"]) == count
    assert output["seed"] == sent.get("seed", output["seed"])


def test_the_upgrade_notes_begin_with_the_filter_that_finds_no_host() -> None:
    config = json.loads((REPOSITORY / ".runpod" / "hub.json").read_text(encoding="utf-8"))["config"]
    notes = UPGRADE.read_text(encoding="utf-8").partition("## Before the image is replaced")[2]
    first = notes[notes.index("1. ") :].partition("2. ")[0]
    assert f"choose {config['allowedCudaVersions'][0]} and every newer one" in first
    assert "12.1 to 12.7" in first


def test_the_upgrade_notes_have_every_field_of_2_1_0_and_its_default() -> None:
    """Those that were sent to 2.1.0: `TAKEN` is all of them."""
    fields = {name for sent, _ in TAKEN for name in sent}
    assert len(fields) == 13
    assert fields <= set(Request.model_fields)
    text = UPGRADE.read_text(encoding="utf-8")
    table = text.partition("<!-- fields -->\n")[2].partition("\n<!-- /fields -->")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    told = {name: stays for named, stays, _ in cells for name in re.findall(r"`(\w+)`", named)}
    assert set(told) == fields
    defaults = {
        name: found[1]
        for name, stays in told.items()
        if (found := re.search(r"`?([\w.]+)`? by default", stays))
    }
    assert len(defaults) >= 5
    assert defaults == {name: str(Request.model_fields[name].default) for name in defaults}


def rows() -> list[tuple[str, str]]:
    """Of the table of what is answered otherwise: what is sent, and the answer here."""
    section = UPGRADE.read_text(encoding="utf-8").partition(
        "## Requests that are answered otherwise"
    )
    table = section[2].partition("\n\n|")[2].partition("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in f"|{table}".splitlines()[2:]]
    return [(sent, here) for sent, _, here in cells]


def test_the_upgrade_notes_tell_what_is_refused() -> None:
    told = [(re.findall(r"`(\"[^`]+)`", sent), here) for sent, here in rows()]
    assert len([samples for samples, _ in told if samples]) >= 10
    refused: set[str] = set()
    for samples, here in told:
        for sample in samples:
            sent = json.loads(f"{{{sample}}}")
            if here.startswith("refused"):
                with pytest.raises(RequestError, match=f"^{next(iter(sent))}: "):
                    parsed(sent)
                refused |= set(sent)
            else:
                parsed(sent)
    assert refused >= {name for sent, _ in REFUSED for name in sent if "prompt" not in name}
