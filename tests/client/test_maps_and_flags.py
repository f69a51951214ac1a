"""What an answer holds beside its pictures: control maps become files, and flags are told."""

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from local_endpoint import LocalEndpoint
from tests.client.conftest import QUICK, InProcess, environment, jobs_since
from tests.control_networks import single
from tests.loading.transformers_networks import save_classifier

PROMPT = "a red circle"
SMALL = ("--width", "64", "--height", "72", "--seed", "3", *QUICK)
FLAGGED = "flagged by the worker's safety checker (nsfw)"


@pytest.fixture(scope="module")
def flagging_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    """With a real worker that has a ControlNet with random weights, and flags every picture."""
    folder = tmp_path_factory.mktemp("beside")
    single().save_pretrained(folder / "controlnets" / "own-canny")
    save_classifier(folder / "checker", likeliest="nsfw")
    settings = {
        "CONTROLNET_DIR": str(folder / "controlnets"),
        "SAFETY_CHECKER": str(folder / "checker"),
    }
    with LocalEndpoint(
        worker_command=[sys.executable, "handler.py"], environment=settings
    ) as endpoint:
        yield endpoint


@pytest.fixture
def control(tmp_path: Path) -> tuple[str, ...]:
    """Options for two control pictures."""
    picture = Image.new("RGB", (64, 72), "navy")
    ImageDraw.Draw(picture).ellipse((10, 10, 50, 60), fill="yellow")
    picture.save(tmp_path / "shape.png")
    picture.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png")
    return (
        *("--controlnet", "canny:shape.png", "--controlnet", "canny:turned.png:0.5"),
        "--return-maps",
    )


def assert_maps_are_those_sent(
    paths: list[Path], endpoint: LocalEndpoint, before: list[Any]
) -> None:
    [job] = jobs_since(endpoint, before)
    sent = [base64.b64decode(uri.partition(",")[2]) for uri in job.output["maps"]]
    assert [path.read_bytes() for path in paths] == sent
    assert len(set(sent)) == 2


def test_maps_are_saved_beside_the_picture_and_listed(
    flagging_endpoint: LocalEndpoint,
    control: tuple[str, ...],
    in_process: InProcess,
    tmp_path: Path,
) -> None:
    before, env = flagging_endpoint.jobs, environment(flagging_endpoint)
    done = in_process("draw", PROMPT, *SMALL, *control, "--out", "c.jpg", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["c.jpg", "c.map-1.png", "c.map-2.png"]
    maps = [tmp_path / "c.map-1.png", tmp_path / "c.map-2.png"]
    assert_maps_are_those_sent(maps, flagging_endpoint, before)
    assert f"c.jpg: {FLAGGED}" in done.stderr.splitlines()


def test_maps_go_with_the_first_of_several_pictures_and_overwrite_nothing(
    flagging_endpoint: LocalEndpoint,
    control: tuple[str, ...],
    in_process: InProcess,
    tmp_path: Path,
) -> None:
    (tmp_path / "two-1.map-2.png").write_text("mine")
    env = environment(flagging_endpoint)
    arguments = ("draw", PROMPT, *SMALL, *control, "--num-images", "2", "--out", "two.png")
    done = in_process(*arguments, "--json", env=env)
    result = json.loads(done.stdout)
    assert result["files"] == ["two-1.png", "two-2.png"]
    assert result["maps"] == ["two-1.map-1.png", "two-1.map-2-2.png"]
    assert result["nsfw"] == {"two-1.png": True, "two-2.png": True}
    assert (tmp_path / "two-1.map-2.png").read_text() == "mine"
    forced = in_process(*arguments, "--json", "--force", env=env)
    assert json.loads(forced.stdout)["maps"] == ["two-1.map-1.png", "two-1.map-2.png"]
    assert Image.open(tmp_path / "two-1.map-2.png").size == (64, 72)


def test_a_batch_saves_maps_and_tells_of_flags_too(
    flagging_endpoint: LocalEndpoint,
    control: tuple[str, ...],
    in_process: InProcess,
    tmp_path: Path,
) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPT)
    before, env = flagging_endpoint.jobs, environment(flagging_endpoint)
    arguments = ("batch", "prompts.txt", *SMALL, *control)
    done = in_process(*arguments, "--json", env=env)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    [file] = result["files"]
    assert result["maps"] == [f"{file.removesuffix('.png')}.map-{i}.png" for i in (1, 2)]
    maps = [tmp_path / name for name in result["maps"]]
    assert_maps_are_those_sent(maps, flagging_endpoint, before)
    assert result["nsfw"] == {file: True}
    assert f"{file}: {FLAGGED}" in done.stderr.splitlines()
    (tmp_path / file).unlink()
    again = in_process(*arguments, env=env)
    assert again.stdout.splitlines() == [file, *result["maps"]], "in the same places"


def test_without_maps_or_a_checker_nothing_is_told_of_them(
    endpoint: LocalEndpoint, in_process: InProcess
) -> None:
    done = in_process("draw", PROMPT, *SMALL, "--json", "--quiet", env=environment(endpoint))
    result = json.loads(done.stdout)
    assert result["maps"] == []
    assert "nsfw" not in result
    assert done.stderr == ""
