"""OpenAI's official client against the worker's own HTTP server."""

import base64
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image

from tests.http_worker import HttpWorker, http_worker
from tests.support import PROMPT

# What makes a picture quick, beside OpenAI's fields.
QUICK = {"num_inference_steps": 2, "refiner_inference_steps": 0}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpWorker]:
    with http_worker(tmp_path_factory.mktemp("worker"), API_KEY="the-key") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def client(worker: HttpWorker) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{worker.url}/v1", api_key="the-key", max_retries=0)


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def png(mode: str, colour: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (128, 128), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_are_generated(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt=PROMPT, n=2, size="128x128", response_format="b64_json", extra_body=QUICK
    )
    assert answer.created > 0
    assert answer.data is not None
    assert [opened(one.b64_json).size for one in answer.data] == [(128, 128)] * 2


def test_a_picture_is_edited_where_the_mask_is_transparent(client: openai.OpenAI) -> None:
    answer = client.images.edit(
        image=("picture.png", png("RGB", (0, 0, 255)), "image/png"),
        mask=("mask.png", png("RGBA", (0, 0, 0, 0)), "image/png"),
        prompt=PROMPT,
        extra_body=QUICK,
    )
    assert answer.data is not None
    [one] = answer.data
    assert opened(one.b64_json).size == (128, 128)


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert models
    assert all(model.object == "model" for model in models)


def test_a_mistake_is_openai_s_bad_request_with_our_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, extra_body={"guidance_scale": -7})
    assert caught.value.type == "invalid_request_error"
    assert "guidance_scale: must be" in caught.value.message


def test_a_wrong_key_is_openai_s_authentication_error(worker: HttpWorker) -> None:
    client = openai.OpenAI(base_url=f"{worker.url}/v1", api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        client.images.generate(prompt=PROMPT)


def test_a_client_that_gives_up_stops_its_job(worker: HttpWorker, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.images.generate(
            prompt=PROMPT, n=8, extra_body={"num_inference_steps": 500}, timeout=1
        )
    # The next job has its turn: those eight pictures would take minutes.
    client.images.generate(prompt=PROMPT, size="128x128", extra_body=QUICK)
    metrics = worker.metrics()
    assert metrics['sdxl_jobs_total{outcome="stopped"}'] == 1
    assert metrics['sdxl_jobs_total{outcome="done"}'] >= 1
