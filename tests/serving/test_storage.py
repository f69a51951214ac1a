"""A job's pictures in storage: links in the answer, and nothing lost where there can be none."""

import asyncio
import base64
import io
import json
import threading
import urllib.request
from typing import Any

import boto3
import pytest
from botocore.config import Config
from PIL import Image

import handler
from sdxl_worker.outputs import size_guard
from sdxl_worker.outputs import upload as upload_module
from sdxl_worker.outputs.bucket import Bucket
from sdxl_worker.serving import ending, storing
from sdxl_worker.serving.ending import hurry
from tests.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY, S3Server
from tests.support import decoded, run

QUICK = {
    "prompt": "a red circle",
    "seed": 3,
    "num_inference_steps": 2,
    "refiner_inference_steps": 0,
}


@pytest.fixture
def _owner_s_bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("BUCKET_NAME", "pics")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", ACCESS_KEY_ID)
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY)


@pytest.fixture
def _no_such_bucket(_owner_s_bucket: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_NAME", "elsewhere")


@pytest.fixture
def _ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "HURRIED_SECONDS", 1.0)
    monkeypatch.setattr(ending, "_ends_at", None)


@pytest.fixture
def _on_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://127.0.0.1:9/job-take/$ID?gpu=TEST")


def presigned(s3: S3Server, key: str) -> str:
    client = boto3.client(
        "s3",
        endpoint_url=s3.url,
        aws_access_key_id=ACCESS_KEY_ID,
        aws_secret_access_key=SECRET_ACCESS_KEY,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    return client.generate_presigned_url("put_object", Params={"Bucket": "pics", "Key": key})


def got(link: str) -> Image.Image:
    with urllib.request.urlopen(link, timeout=10) as response:
        return Image.open(io.BytesIO(response.read()))


@pytest.mark.usefixtures("_owner_s_bucket")
def test_the_owner_s_bucket_gets_the_pictures_and_the_caller_links(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = run({**QUICK, "num_images": 2})
    assert list(output) == ["images", "image_url", "seed"]
    assert output["image_url"] == output["images"][0]
    with monkeypatch.context() as without:
        without.delenv("BUCKET_ENDPOINT_URL")
        for name in ("NAME", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            without.delenv(f"BUCKET_{name}")
        inline = run({**QUICK, "num_images": 2})
    for link, uri in zip(output["images"], inline["images"], strict=True):
        assert "/pics/test/" in link
        assert got(link).tobytes() == decoded(uri).tobytes()


@pytest.mark.usefixtures("_owner_s_bucket")
@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_have_their_own_names_there(output_format: str) -> None:
    output = run({**QUICK, "output_format": output_format, "duplicate_first": False})
    assert f".{output_format}?" in output["image_url"], "a link costs nothing to have twice"
    assert got(output["image_url"]).format == output_format.upper()


@pytest.mark.usefixtures("_owner_s_bucket", "_on_the_platform")
def test_what_is_uploaded_may_be_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", 2000)
    assert run({**QUICK, "num_images": 2})["images"][1].startswith("http")


@pytest.mark.usefixtures("_no_such_bucket")
def test_a_job_s_own_bucket_wins_over_the_owner_s(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    config = {
        "accessId": ACCESS_KEY_ID,
        "accessSecret": SECRET_ACCESS_KEY,
        "bucketName": "pics",
        "endpointUrl": s3.url,
    }
    own = {"id": "own", "input": QUICK, "s3Config": config}
    output = asyncio.run(handler.handler(own))
    assert len(list((s3.folder / "pics" / "own").iterdir())) == 1
    assert "warning" not in output
    for value in (3, "", "\ud800"):
        wrong = {**own, "s3Config": {**config, "bucketName": value}}
        assert "wrong or missing: bucketName" in asyncio.run(handler.handler(wrong))["error"]


@pytest.mark.usefixtures("_no_such_bucket")
def test_presigned_addresses_win_over_both(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    urls = [presigned(s3, f"presigned/{i}.png") for i in range(2)]
    job_input = {**QUICK, "num_images": 2, "upload_urls": urls}
    output = asyncio.run(handler.handler({"id": "x", "input": job_input, "s3Config": {"a": 1}}))
    assert output["images"] == [url.partition("?")[0] for url in urls]
    for i in range(2):
        assert Image.open(s3.folder / "pics" / "presigned" / f"{i}.png").size == (128, 128)


def test_private_addresses_are_not_uploaded_to(s3: S3Server) -> None:
    url = presigned(s3, "private.png")
    message = "upload_urls[0]: the worker connects to public addresses only: use one"
    assert run({**QUICK, "upload_urls": [url]}) == {"error": message}, "before any work"
    # A name tells nothing before it is looked up.
    output = run({**QUICK, "upload_urls": [url.replace("127.0.0.1", "127.0.0.1.nip.io")]})
    assert decoded(output["images"][0]).size == (128, 128)
    assert output["warning"].startswith("1 of 1 pictures not uploaded: the storage: ")
    assert not (s3.folder / "pics" / "private.png").exists()


@pytest.mark.usefixtures("_no_such_bucket")
def test_a_picture_that_is_not_uploaded_is_in_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    output = run({**QUICK, "num_images": 2})
    assert [decoded(uri).size for uri in output["images"]] == [(128, 128)] * 2
    assert output["warning"].startswith("2 of 2 pictures not uploaded: the storage answered 404")
    assert "NoSuchBucket" in output["warning"]
    for secret in (SECRET_ACCESS_KEY, "X-Amz", QUICK["prompt"]):
        assert str(secret) not in output["warning"] + caplog.text


@pytest.mark.usefixtures("_no_such_bucket", "_on_the_platform")
def test_where_it_does_not_fit_the_error_gives_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", 2000)
    message = run(QUICK)["error"]
    assert message.startswith("not uploaded: the storage answered 404")
    assert "the platform takes 0 MB" in message


@pytest.mark.usefixtures("_on_the_platform")
def test_of_several_the_uploaded_ones_stay_links(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.setattr(upload_module, "FIRST_PAUSE_SECONDS", 0.01)
    urls = [presigned(s3, f"some/{i}.png") for i in range(3)]
    urls[1] = urls[1].replace("X-Amz-Signature=", "X-Amz-Signature=0")
    job_input = {**QUICK, "num_images": 3, "upload_urls": urls}
    output = run({**job_input, "output_format": "jpeg"})
    kinds = [image.partition(":")[0] for image in output["images"]]
    assert kinds == ["http", "data", "http"]
    assert output["warning"].startswith("1 of 3 pictures not uploaded: the storage answered 403")
    # What was not uploaded is made to fit alone.
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", 15_000)
    output = run({**job_input, "on_too_large": "jpeg"})
    data = base64.b64decode(output["images"][1].removeprefix("data:image/jpeg;base64,"))
    assert b'"seed": 4' in data.replace(b"&quot;", b'"'), "its own"
    assert "the pictures are JPEG of quality" in output["warning"]
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", 1000)
    message = run(job_input)["error"]
    assert f"stored: {urls[0].partition('?')[0]}" in message
    assert "X-Amz" not in message


@pytest.mark.usefixtures("_on_the_platform")
def test_a_first_picture_that_is_a_link_leaves_its_room_to_the_others(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    urls = [presigned(s3, f"room/{i}.png") for i in range(2)]
    urls[1] = urls[1].replace("X-Amz-Signature=", "X-Amz-Signature=0")
    job_input = {**QUICK, "num_images": 2, "upload_urls": urls}
    answer_bytes = len(json.dumps({"output": run(job_input)}))
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", answer_bytes + 200)
    output = run(job_input)
    assert output["images"][1].startswith("data:image/png")
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", answer_bytes - 1)
    fitted = run({**job_input, "on_too_large": "jpeg"})
    assert len(json.dumps({"output": fitted})) < answer_bytes


@pytest.mark.usefixtures("_owner_s_bucket")
def test_whatever_fails_at_uploading_the_pictures_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("hunter2")

    monkeypatch.setattr(Bucket, "signed", fail)
    output = run(QUICK)
    assert decoded(output["images"][0]).size == (128, 128)
    assert output["warning"] == (
        "1 of 1 pictures not uploaded: the worker failed at uploading it (RuntimeError)"
    )


@pytest.mark.usefixtures("_owner_s_bucket", "_ending")
def test_at_the_end_of_the_worker_what_is_stored_stays_a_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put, later = upload_module._put, threading.Event()

    async def slow(session: Any, destination: Any, index: int, *arguments: Any) -> str:
        if index == 1:
            later.set()
            await asyncio.sleep(30)
        return await put(session, destination, index, *arguments)

    monkeypatch.setattr(upload_module, "_put", slow)

    async def ended() -> dict[str, Any]:
        answering = asyncio.create_task(
            handler.handler({"id": "test", "input": {**QUICK, "num_images": 2}})
        )
        await asyncio.to_thread(later.wait, 60)
        hurry()
        return await answering

    output = asyncio.run(ended())
    assert output["images"][0].startswith("http")
    assert output["images"][1].startswith("data:")
    assert output["warning"] == "1 of 2 pictures not uploaded: the worker was told to end"


@pytest.mark.usefixtures("_owner_s_bucket", "_ending")
def test_at_the_end_of_the_worker_a_check_does_not_wait_for_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def slow(*_: object) -> str:
        hurry()
        await asyncio.sleep(30)
        return "ok"

    monkeypatch.setattr(storing, "check_storage", slow)
    assert run({"check": True})["storage"] == "not checked: the worker was told to end"


@pytest.mark.usefixtures("_owner_s_bucket")
def test_a_check_tells_whether_storage_works(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run({"check": True})["storage"] == "ok"
    assert not list((s3.folder / "pics").glob("**/check/*")), "nothing is left"
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "wrong-hunter3")
    told = run({"check": True})["storage"]
    assert told.startswith("put: the storage answered 403")
    assert "hunter" not in told
