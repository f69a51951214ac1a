"""The official client of OpenAI's API, a local endpoint and a real worker."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image, ImageDraw

from local_endpoint import LocalEndpoint, Rules
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from tests import tutorial
from tests.support import REPOSITORY, noise_picture

PROMPT = "a red circle on a blue background"
# Ours, beside OpenAI's.
QUICK = {"seed": 7, "num_inference_steps": 4, "refiner_inference_steps": 0}
SIZE = (72, 64)
HOLE = (8, 16, 40, 48)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    models_dir = tmp_path_factory.mktemp("models")
    (models_dir / "alone").symlink_to(EMBEDDED_MODEL_DIR / "base")
    with LocalEndpoint(
        rules=Rules(ping_interval_seconds=1, poll_seconds=5, runsync_retention_seconds=3600),
        environment={"RUNPOD_LOG_LEVEL": "", "MODELS_DIR": str(models_dir), "BATCH_JOBS": "2"},
    ) as running:
        yield running


def client_of(endpoint: LocalEndpoint, path: str = "", **options: Any) -> openai.OpenAI:
    options = {"api_key": endpoint.api_key, "timeout": 120, **options}
    return openai.OpenAI(base_url=f"{endpoint.url}{path}/openai/v1", **options)


@pytest.fixture
def client(endpoint: LocalEndpoint) -> openai.OpenAI:
    """As for an endpoint of Runpod's."""
    return client_of(endpoint)


def files_in(response: openai.types.ImagesResponse) -> list[bytes]:
    assert response.data is not None
    return [base64.b64decode(one.b64_json or "", validate=True) for one in response.data]


def opened(file: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(file))
    picture.load()
    return picture


def own_files(endpoint: LocalEndpoint, **fields: Any) -> list[bytes]:
    """What our own job gives."""
    answer = endpoint.wait(endpoint.run({"prompt": PROMPT, **QUICK, **fields}))
    assert answer["status"] == "COMPLETED", answer
    return [base64.b64decode(uri.partition(",")[2]) for uri in answer["output"]["images"]]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def photo() -> Image.Image:
    picture = noise_picture(*SIZE)
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="red")
    return picture


def mask() -> Image.Image:
    """Transparent where it is to be repainted."""
    picture = Image.new("RGBA", SIZE, (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), HOLE)
    return picture


def extra(response: Any, name: str) -> Any:
    """What stands beside OpenAI's own."""
    return (response.model_extra or {}).get(name)


def test_pictures_of_a_prompt_are_those_of_our_own_job_and_their_seed_gives_them_again(
    endpoint: LocalEndpoint, client: openai.OpenAI
) -> None:
    response = client.images.generate(
        prompt=PROMPT, model="gpt-image-1", n=2, size="72x64", extra_body=QUICK
    )
    assert abs(response.created - time.time()) < 600
    assert (response.size, response.output_format, response.quality) == ("72x64", "png", "medium")
    assert extra(response, "seed") == 7
    files = files_in(response)
    assert [opened(file).size for file in files] == [(72, 64), (72, 64)]
    assert files == own_files(endpoint, num_images=2, width=72, height=64)
    again = client.images.generate(prompt=PROMPT, n=2, size="72x64", extra_body=QUICK)
    assert files_in(again) == files
    of_chance = client.images.generate(
        prompt=PROMPT, size="64x64", extra_body={"num_inference_steps": 1}
    )
    told = {"num_inference_steps": 1, "seed": extra(of_chance, "seed")}
    same = client.images.generate(prompt=PROMPT, size="64x64", extra_body=told)
    assert files_in(same) == files_in(of_chance)


def test_the_plain_address_serves_as_well(endpoint: LocalEndpoint) -> None:
    plain = openai.OpenAI(
        base_url=endpoint.url_base.replace("/v2", "/openai/v1"), api_key=endpoint.api_key
    )
    [file] = files_in(plain.images.generate(prompt=PROMPT, size="64x64", extra_body=QUICK))
    assert [file] == own_files(endpoint, width=64, height=64)


def test_every_format_is_delivered(client: openai.OpenAI) -> None:
    for output_format in ("png", "jpeg", "webp"):
        response = client.images.generate(
            prompt=PROMPT,
            size="64x64",
            output_format=output_format,
            output_compression=80,
            response_format="b64_json",
            extra_body=QUICK,
        )
        assert response.output_format == output_format
        [file] = files_in(response)
        assert opened(file).format == output_format.upper()


def test_a_url_without_storage_is_the_picture_itself(client: openai.OpenAI) -> None:
    response = client.images.generate(
        prompt=PROMPT, size="64x64", response_format="url", extra_body=QUICK
    )
    assert response.data is not None
    url = response.data[0].url or ""
    assert url.startswith("data:image/png;base64,")
    assert opened(base64.b64decode(url.partition(",")[2])).size == (64, 64)


def test_an_edit_changes_what_the_mask_leaves_transparent_and_nothing_else(
    client: openai.OpenAI,
) -> None:
    response = client.images.edit(
        image=("photo.png", png(photo())),
        mask=io.BytesIO(png(mask())),
        prompt=PROMPT,
        n=2,
        extra_body={**QUICK, "mask_blur": 0, "preview": False},
    )
    files = files_in(response)
    assert len(files) == 2
    hole = np.zeros(SIZE[::-1], bool)
    hole[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = True
    before = np.asarray(photo())
    for file in files:
        after = np.asarray(opened(file))
        assert np.array_equal(after[~hole], before[~hole]), "byte for byte"
        assert (after[hole] != before[hole]).mean() > 0.5
    assert response.size == "72x64"


def test_an_edit_without_a_mask_redraws_the_picture_in_the_size_that_is_asked_for(
    endpoint: LocalEndpoint, client: openai.OpenAI, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(png(photo()))
    with (tmp_path / "photo.png").open("rb") as file:
        response = client.images.edit(image=[file], prompt=PROMPT, size="64x64", extra_body=QUICK)
    uri = f"data:image/png;base64,{base64.b64encode(png(photo())).decode()}"
    fields = {"image_url": uri, "mode": "img2img", "width": 64, "height": 64}
    assert files_in(response) == own_files(endpoint, **fields)


def test_the_models_are_listed_and_chosen_by_name(client: openai.OpenAI) -> None:
    listed = client.models.list()
    assert [one.id for one in listed] == ["shapes", "alone"]
    assert {one.owned_by for one in listed.data} == {"sdxl-worker"}
    for one in listed.data:
        fields = {"seed": 1, "num_inference_steps": 1}
        response = client.images.generate(
            prompt=PROMPT, model=one.id, size="64x64", extra_body=fields
        )
        assert extra(response, "model") == one.id


def test_what_the_caller_has_to_change_is_a_bad_request_with_all_of_it(
    endpoint: LocalEndpoint, client: openai.OpenAI
) -> None:
    jobs_before = len(endpoint.jobs)
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(
            prompt=PROMPT, n=99, size="1000x1001", model="sdxl", extra_body={"sed": 1}
        )
    assert isinstance(caught.value.body, dict)
    assert caught.value.type == "invalid_request_error"
    lines = caught.value.body["message"].splitlines()
    assert lines[0] == "n: must be an integer from 1 to 16; got 99"
    assert lines[1].startswith("size: must be auto, or WIDTHxHEIGHT")
    assert lines[2].startswith('"sed": no such field (did you mean seed?)')
    with pytest.raises(openai.BadRequestError, match='this worker has no "sdxl".*it has "alone"'):
        client.images.generate(prompt=PROMPT, model="sdxl")
    with pytest.raises(openai.BadRequestError, match="image: must be one picture"):
        client.images.edit(image=[png(photo()), png(photo())], prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="mask: the picture has no transparency"):
        client.images.edit(image=png(photo()), mask=png(photo()), prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="stream: must be false, or left out"):
        client.images.generate(prompt=PROMPT, stream=True)
    with pytest.raises(openai.BadRequestError, match="background: must be auto or opaque"):
        client.images.generate(prompt=PROMPT, background="transparent")
    assert len(endpoint.jobs) == jobs_before + 6, "none is sent twice"


def test_a_wrong_key_is_told_by_the_client_s_own_error(endpoint: LocalEndpoint) -> None:
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        client_of(endpoint, api_key="wrong").models.list()


def test_other_routes_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="x", messages=[])


def test_a_client_that_does_not_wait_stops_its_job(endpoint: LocalEndpoint) -> None:
    """Which then leaves the GPU to the next one."""
    impatient = client_of(endpoint, max_retries=0, timeout=3)
    with pytest.raises(openai.APITimeoutError):
        impatient.images.generate(prompt=PROMPT, n=8, extra_body={"num_inference_steps": 500})
    assert endpoint.wait(endpoint.jobs[-1].id)["status"] == "CANCELLED"
    assert files_in(client_of(endpoint).images.generate(prompt=PROMPT, extra_body=QUICK))


def test_calls_at_the_same_time_each_get_their_own_pictures(endpoint: LocalEndpoint) -> None:
    answers: dict[str, Any] = {}

    def ask(prompt: str) -> None:
        answers[prompt] = client_of(endpoint).images.generate(
            prompt=prompt, size="64x64", extra_body=QUICK
        )

    prompts = [f"a {colour} circle on a white background" for colour in ("red", "green", "blue")]
    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt in prompts:
        [file] = files_in(answers[prompt])
        [alone] = own_files(endpoint, prompt=prompt, width=64, height=64)
        one, other = (np.asarray(opened(data), np.int16) for data in (file, alone))
        assert np.abs(one - other).max() <= 2, "more than rounding"


@tutorial.needs_curl
@pytest.mark.parametrize("language", ["python", "sh"])
def test_the_guide_s_examples_work(language: str, endpoint: LocalEndpoint, tmp_path: Path) -> None:
    """But for JavaScript's, for which there is nothing here to run it with."""
    if language == "sh" and shutil.which("jq") is None:
        pytest.skip("the command needs jq")
    guide = (REPOSITORY / "docs" / "openai.md").read_text(encoding="utf-8")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "photo.png")
    hole = Image.new("RGBA", (64, 64), "black")
    hole.paste((0, 0, 0, 0), (16, 16, 48, 48))
    hole.save(tmp_path / "mask.png")
    [block] = re.findall(rf"^```{language}\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    assert "https://api.runpod.ai/v2/ENDPOINT_ID/openai/v1" in block
    block = block.replace("https://api.runpod.ai/v2", endpoint.url_base)
    command = [sys.executable, "-c", block] if language == "python" else ["sh", "-ec", block]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if language == "python":
        assert ran.stdout == "128x128 7\n"
        assert opened((tmp_path / "circle.png").read_bytes()).size == (128, 128)
        assert opened((tmp_path / "edited.png").read_bytes()).size == (64, 64)
    else:
        assert opened((tmp_path / "star.png").read_bytes()).size == (128, 128)
        assert json.loads((tmp_path / "models.json").read_text())["object"] == "list"
        edited = json.loads((tmp_path / "edited.json").read_text())
        assert opened(base64.b64decode(edited["data"][0]["b64_json"])).size == (64, 64)
