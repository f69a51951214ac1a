"""Pictures into storage: a real S3 server, and one that fails in every way."""

import asyncio
import logging
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import boto3
import numpy as np
import pytest
from aiohttp import web
from botocore.config import Config

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import connections
from sdxl_worker.outputs import upload as upload_module
from sdxl_worker.outputs.bucket import Bucket
from sdxl_worker.outputs.upload import (
    PutUrls,
    UploadFailure,
    check_storage,
    destination,
    upload,
)
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings
from tests.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY, S3Server

PICTURES = [np.random.default_rng(i).bytes(300_000 + i) for i in range(5)]
OTHER_SECRET = "other-hunter2"  # noqa: S105
SECRETS = ("hunter2", "Signature=", ACCESS_KEY_ID)


@pytest.fixture
def bucket(s3: S3Server) -> Bucket:
    return Bucket(
        f"{s3.url}/pics",
        "us-east-1",
        ACCESS_KEY_ID,
        SECRET_ACCESS_KEY,
        prefix="made here/ä",
        private_allowed=True,
    )


def uploaded(where: Bucket | PutUrls, job_id: str = "job-1", count: int = 1) -> Any:
    return asyncio.run(upload(PICTURES[:count], "image/png", "png", where, job_id))


def cause(where: Bucket | PutUrls) -> str:
    """Of an upload that must fail, and must tell nothing that nobody should know."""
    [failure] = uploaded(where)
    assert isinstance(failure, UploadFailure)
    assert not [secret for secret in SECRETS if secret in repr(failure)]
    assert "127.0.0.1" not in failure.cause
    return failure.cause


def got(link: str) -> tuple[bytes, str]:
    with urllib.request.urlopen(link) as response:
        return response.read(), response.headers["Content-Type"]


class TestBucket:
    def test_each_link_gives_its_picture_with_its_type(self, bucket: Bucket) -> None:
        links = uploaded(bucket, count=5)
        assert [got(link) for link in links] == [(data, "image/png") for data in PICTURES]
        assert len(set(links)) == 5

    def test_objects_are_below_the_prefix_and_the_job(self, bucket: Bucket, s3: S3Server) -> None:
        [link] = uploaded(bucket, "sync-1-e1")
        path = link.partition("?")[0].removeprefix(f"{s3.url}/pics/")
        assert path.startswith("made%20here/%C3%A4/sync-1-e1/")
        assert path.endswith(".png")

    @pytest.mark.parametrize("job_id", ["../../x", "a/b?c#d %41", "..", "\n", "ä", "x" * 500])
    def test_an_odd_id_is_a_folder_in_its_place(
        self, job_id: str, bucket: Bucket, s3: S3Server
    ) -> None:
        [link] = uploaded(bucket, job_id)
        assert got(link)[0] == PICTURES[0]
        [folder, _] = link.partition("?")[0].removeprefix(f"{s3.url}/pics/").split("/")[2:]
        assert len(folder) <= 100
        assert set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-"), folder

    def test_the_same_job_again_overwrites_nothing(self, bucket: Bucket) -> None:
        assert uploaded(bucket) != uploaded(bucket)

    def test_a_wrong_key_is_told(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        """Though this server closes the connection on a picture that it does not want."""
        monkeypatch.setattr(upload_module, "FIRST_PAUSE_SECONDS", 0.01)
        told = cause(replace(bucket, secret_access_key=OTHER_SECRET))
        assert told.startswith("the storage answered 403 Forbidden (SignatureDoesNotMatch): corr")
        told = cause(replace(bucket, access_key_id="AKIDOTHER"))
        assert told == (
            "the storage answered 403 Forbidden (InvalidAccessKeyId): correct the access key's id"
        )

    def test_a_bucket_that_is_not_there_is_told(self, bucket: Bucket) -> None:
        told = cause(replace(bucket, url=bucket.url.replace("pics", "none")))
        assert told == (
            "the storage answered 404 Not Found (NoSuchBucket): there is no such bucket: correct "
            "its name (BUCKET_NAME, bucketName)"
        )

    def test_nothing_secret_is_logged(
        self, bucket: Bucket, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        for name in ("sdxl_worker", "botocore", "aiohttp"):
            caplog.set_level(logging.DEBUG, name)
        logging.getLogger("sdxl_worker").propagate = True
        [link] = uploaded(bucket)
        cause(replace(bucket, secret_access_key=OTHER_SECRET))
        assert "not uploaded" in caplog.text, "what is logged is seen"
        assert not [secret for secret in SECRETS if secret in caplog.text]
        assert "hunter2" not in link


def presigned(s3: S3Server, key: str, **more: str) -> str:
    client = boto3.client(
        "s3",
        endpoint_url=s3.url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY_ID,
        aws_secret_access_key=SECRET_ACCESS_KEY,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    where = {"Bucket": "pics", "Key": key, **more}
    return str(client.generate_presigned_url("put_object", Params=where))


class TestPresignedAddresses:
    @pytest.mark.parametrize("signed", [{}, {"ContentType": "image/png"}])
    def test_each_picture_goes_to_its_address_and_the_link_has_no_query(
        self, signed: dict[str, str], s3: S3Server
    ) -> None:
        urls = tuple(presigned(s3, f"put/{i} ~ä.png", **signed) for i in range(5))
        links = uploaded(PutUrls(urls, private_allowed=True), count=5)
        assert links == [url.partition("?")[0] for url in urls]
        for i, picture in enumerate(PICTURES):
            assert (s3.folder / "pics" / "put" / f"{i} ~ä.png").read_bytes() == picture

    def test_another_type_than_the_signed_one_is_told(self, s3: S3Server) -> None:
        url = presigned(s3, "typed.webp", ContentType="image/webp")
        assert "SignatureDoesNotMatch" in cause(PutUrls((url,), private_allowed=True))

    @pytest.mark.parametrize(
        ("url", "headers"),
        [
            ("https://a/b", {"Content-Type"}),
            ("https://a/b?X-Amz-SignedHeaders=host&X-Amz-Signature=1", set()),
            (
                "https://a/b?X-Amz-SignedHeaders=content-type%3Bhost&X-Amz-Signature=1",
                {"Content-Type"},
            ),
            ("https://a/b?X-Goog-SignedHeaders=host&X-Goog-Signature=1", set()),
            (
                "https://a/b?X-Goog-SignedHeaders=Content-Type;host&X-Goog-Signature=1",
                {"Content-Type"},
            ),
            ("https://a/b?GoogleAccessId=a&Expires=1&Signature=1", set()),
            ("https://a/b?x-oss-signature-version=1&x-oss-signature=1", set()),
            (
                "https://acc.blob.core.windows.net/c/b.png?sv=1&sr=b&sig=1",
                {"Content-Type", "x-ms-blob-type"},
            ),
            ("https://blob.core.windows.net.evil.example/c/b.png?sig=1", {"Content-Type"}),
        ],
    )  # fmt: skip
    def test_only_signed_headers_are_sent(self, url: str, headers: set[str]) -> None:
        assert set(upload_module._headers_of_put(url, "image/png")) == headers


class Faults:
    """A storage that does as it is told, one answer for each request, and counts them."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, dict(request.headers)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, str):  # broken off in the middle
            await request.content.read(1000)
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = 200
        await request.read()
        if isinstance(answer, tuple):
            status, code = answer
            return web.Response(status=status, text=f"<Error><Code>{code}</Code>hunter2</Error>")
        location = {"Location": f"{self.url}/elsewhere"} if 300 <= answer < 400 else {}
        return web.Response(status=answer, headers=location, reason="hunter2")


@asynccontextmanager
async def failing(faults: Faults) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", faults.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    faults.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield faults.url
    finally:
        await runner.cleanup()


async def through(faults: Faults, count: int = 1, **how: Any) -> list[Any]:
    async with failing(faults) as url:
        bucket = Bucket(url + "/b", "x", ACCESS_KEY_ID, "hunter2", private_allowed=True)
        urls = tuple(f"{url}/{i}?X-Amz-Signature=hunter2" for i in range(count))
        where = PutUrls(urls, private_allowed=True) if how.get("presigned") else bucket
        return await upload(PICTURES[:count], "image/png", "png", where, "job")


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.mark.usefixtures("_quick")
class TestFaults:
    @pytest.mark.parametrize("presigned", [False, True])
    @pytest.mark.parametrize(
        ("answers", "requests", "told"),
        [
            ([503, 200], 2, None),
            ([500, 502, 201], 3, None),
            ([429, 204], 2, None),
            (["cut", 200], 2, None),
            ([500], 3, "the storage answered 500 Internal Server Error (tried 3 times)"),
            (
                [(503, "SlowDown")],
                3,
                "the storage answered 503 Service Unavailable (SlowDown) (tried 3 times)",
            ),
            # aiohttp sends what is cut off once more by itself.
            (["cut"], 6, "the storage: its server broke off, or does not speak HTTP: try again "
                "(tried 3 times)"),
            ([400], 1, "the storage answered 400 Bad Request"),
            ([(403, "AccessDenied")], 1, "the storage answered 403 Forbidden (AccessDenied): the "
                "access key needs the right to do this in this bucket"),
            ([(403, "hunter2 <b>")], 1, "the storage answered 403 Forbidden"),
            ([(404, "NoSuchBucket")], 1, "the storage answered 404 Not Found (NoSuchBucket): there "
                "is no such bucket: correct its name (BUCKET_NAME, bucketName)"),
            ([307], 1, "the storage answered 307 Temporary Redirect, a redirect, which is not "
                "followed: use the address, or the region, that it redirects to"),
            ([301], 1, "the storage answered 301 Moved Permanently, a redirect, which is not "
                "followed: use the address, or the region, that it redirects to"),
        ],
    )  # fmt: skip
    def test_an_upload_ends_as_it_should(
        self, answers: list[Any], requests: int, told: str | None, presigned: bool
    ) -> None:
        faults = Faults(*answers)
        [outcome] = asyncio.run(through(faults, presigned=presigned))
        assert outcome == UploadFailure(told) if told else isinstance(outcome, str)
        assert len(faults.requests) == requests

    def test_a_slow_storage_is_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(upload_module, "TRY_SECONDS", 0.2)
        faults = Faults(5.0, 200)
        [outcome] = asyncio.run(through(faults))
        assert isinstance(outcome, str)
        assert len(faults.requests) == 2

    def test_one_deadline_covers_all_tries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(upload_module, "TRY_SECONDS", 0.2)
        monkeypatch.setattr(upload_module, "UPLOAD_SECONDS", 0.5)
        monkeypatch.setattr(upload_module, "FIRST_PAUSE_SECONDS", 10)
        [outcome] = asyncio.run(through(Faults(5.0)))
        assert outcome == UploadFailure("the storage took longer than 0.2 seconds (tried 1 times)")
        monkeypatch.setattr(upload_module, "TRY_SECONDS", 60)
        [outcome] = asyncio.run(through(Faults(5.0)))
        assert outcome == UploadFailure("the storage did not take it within 0.5 seconds in all")

    def test_one_picture_that_fails_leaves_the_others(self) -> None:
        faults = Faults(200, 400, 200)
        outcomes = asyncio.run(through(faults, count=3))
        assert [isinstance(one, UploadFailure) for one in outcomes].count(True) == 1

    def test_pictures_of_a_job_go_side_by_side(self) -> None:
        async def timed() -> float:
            began = asyncio.get_running_loop().time()
            await through(Faults(0.5), count=4)
            return asyncio.get_running_loop().time() - began

        assert asyncio.run(timed()) < 1.5

    def test_a_job_that_is_stopped_uploads_no_more(self) -> None:
        faults = Faults(10.0)

        async def stop() -> None:
            async with failing(faults) as url:
                where = Bucket(url, "x", ACCESS_KEY_ID, "hunter2", private_allowed=True)
                work = upload(PICTURES[:1], "image/png", "png", where, "job")
                uploading = asyncio.create_task(work)
                while not faults.requests:
                    await asyncio.sleep(0.01)
                uploading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await uploading

        asyncio.run(stop())
        assert len(faults.requests) == 1

    def test_no_header_is_sent_that_was_not_signed(self) -> None:
        faults = Faults(200)
        asyncio.run(through(faults, presigned=True))
        [(method, headers)] = faults.requests
        assert method == "PUT"
        assert headers["Content-Length"] == str(len(PICTURES[0]))
        assert not {"Content-Type", "Authorization", "Transfer-Encoding"} & set(headers)

    def test_a_storage_that_refuses_before_it_reads_is_understood(self) -> None:
        """It closes with the picture unread."""

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.1)
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        async def refused() -> Any:
            async with await asyncio.start_server(refuse, "127.0.0.1", 0, limit=1000) as listening:
                url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
                where = PutUrls((url,), private_allowed=True)
                return await upload([bytes(20_000_000)], "image/png", "png", where, "job")

        assert asyncio.run(refused()) == [UploadFailure("the storage answered 403 Forbidden")]

    def test_a_storage_that_refuses_unread_is_asked_for_its_reason(self) -> None:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"100-continue" in head:
                writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
            writer.transport.abort() if b"100-continue" not in head else writer.close()

        async def refused() -> Any:
            async with await asyncio.start_server(refuse, "127.0.0.1", 0) as listening:
                url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/a.png"
                where = PutUrls((url,), private_allowed=True)
                return await upload(PICTURES[:1], "image/png", "png", where, "job")

        assert asyncio.run(refused()) == [UploadFailure("the storage answered 403 Forbidden")]

    def test_a_storage_that_never_asks_for_the_picture_gets_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(upload_module, "TRY_SECONDS", 1)

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(PICTURES[0]))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        async def taken() -> Any:
            async with await asyncio.start_server(take, "127.0.0.1", 0) as listening:
                url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
                where = PutUrls((f"{url}/a.png?b",), private_allowed=True)
                outcome = await upload(PICTURES[:1], "image/png", "png", where, "job")
                return outcome == [f"{url}/a.png"]

        assert asyncio.run(taken())

    def test_a_dead_storage_is_told(self) -> None:
        where = Bucket("http://127.0.0.1:9", "x", ACCESS_KEY_ID, "hunter2", private_allowed=True)
        assert "cannot be reached" in cause(where)


class TestAddresses:
    """A caller's storage is a stranger's server, as that of a picture is."""

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254"])
    def test_those_of_a_job_must_be_public(
        self, host: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = f"http://{host}:9/a?X-Amz-Signature=hunter2"
        config = {
            "accessId": ACCESS_KEY_ID,
            "accessSecret": "hunter2",
            "bucketName": "b",
            "endpointUrl": f"http://{host}:9",
        }

        async def connected(*_: Any) -> None:
            pytest.fail("connected")

        monkeypatch.setattr(connections._loop(), "sock_connect", connected)
        for job in ({"s3Config": config}, {}):
            given = parse_request({"prompt": "a", **({} if job else {"upload_urls": [url]})})
            name = "s3Config.endpointUrl" if job else r"upload_urls\[0\]"
            with pytest.raises(RequestError, match=f"^{name}: the worker connects to public"):
                destination(job, given, Settings())
        bucket = Bucket(url.partition("?")[0], "x", ACCESS_KEY_ID, "hunter2")
        for where in (bucket, PutUrls((url,), private_allowed=False)):
            told = cause(where)  # as where a name leads there
            assert "public addresses only" in told
            assert "tried" not in told, "it would be the same at the next try"

    def test_what_cannot_be_used_is_tried_once(self) -> None:
        told = cause(PutUrls(("http://:80/",), private_allowed=True))
        assert told == "the storage: not an address that can be used: correct it"

    def test_the_owner_may_allow_private_ones(
        self, s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
        config = {
            "accessId": ACCESS_KEY_ID,
            "accessSecret": SECRET_ACCESS_KEY,
            "bucketName": "pics",
            "endpointUrl": s3.url,
        }
        where = destination({"s3Config": config}, parse_request({"prompt": "a"}), Settings())
        assert where is not None
        [link] = uploaded(where)
        assert got(link)[0] == PICTURES[0]


class TestDestination:
    OWNER: ClassVar = {
        "BUCKET_ENDPOINT_URL": "http://minio:9000/owner",
        "BUCKET_ACCESS_KEY_ID": "a",
        "BUCKET_SECRET_ACCESS_KEY": "hunter2",
    }
    JOB: ClassVar = {
        "s3Config": {
            "accessId": "a",
            "accessSecret": "hunter2",
            "bucketName": "job",
            "endpointUrl": "https://s3.example",
        }
    }

    def test_the_nearer_to_the_picture_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = parse_request({"prompt": "a"})
        with_urls = parse_request({"prompt": "a", "upload_urls": ["https://a/b?c=hunter2"]})
        assert destination({}, plain, Settings()) is None
        assert destination({"s3Config": None}, plain, Settings()) is None
        for name, value in self.OWNER.items():
            monkeypatch.setenv(name, value)
        owners = destination({}, plain, Settings())
        assert isinstance(owners, Bucket)
        assert owners.url == "http://minio:9000/owner"
        assert owners.private_allowed, "it is the owner's own"
        jobs = destination(self.JOB, plain, Settings())
        assert isinstance(jobs, Bucket)
        assert jobs.url == "https://s3.example/job"
        assert not jobs.private_allowed
        addresses = destination(self.JOB, with_urls, Settings())
        assert isinstance(addresses, PutUrls)
        assert not [one for one in (owners, jobs, addresses) if "hunter2" in repr(one)]

    def test_a_job_may_name_its_region(self) -> None:
        job = {"s3Config": {**self.JOB["s3Config"], "region": "eu-1"}}
        found = destination(job, parse_request({"prompt": "a"}), Settings())
        assert isinstance(found, Bucket)
        assert found.region == "eu-1"
        for region in (3, ["eu-1"]):
            with pytest.raises(RequestError, match="wrong or missing: region"):
                destination(
                    {"s3Config": {**self.JOB["s3Config"], "region": region}},
                    parse_request({"prompt": "a"}),
                    Settings(),
                )

    def test_what_is_wrong_with_a_jobs_storage_is_told_before_any_work(self) -> None:
        plain = parse_request({"prompt": "a"})
        with pytest.raises(RequestError, match="s3Config: must be an object"):
            destination({"s3Config": {"accessSecret": "hunter2"}}, plain, Settings())
        given = parse_request({"prompt": "a", "upload_urls": ["http://[x?hunter2"]})
        with pytest.raises(RequestError, match=r"^upload_urls\[0\]: not an address") as caught:
            destination({}, given, Settings())
        assert "hunter2" not in str(caught.value)


class TestCheck:
    def test_a_storage_that_works_is_ok_and_left_as_it_was(
        self, bucket: Bucket, s3: S3Server
    ) -> None:
        where = replace(bucket, prefix="checked")
        assert asyncio.run(check_storage(where)) == "ok"
        left = [path for path in Path(s3.folder).rglob("checked/**/*") if path.is_file()]
        assert left == []

    def test_what_fails_is_told(self, bucket: Bucket) -> None:
        wrong = replace(bucket, secret_access_key=OTHER_SECRET)
        told = asyncio.run(check_storage(wrong))
        assert told.startswith("put: the storage answered 403 Forbidden (SignatureDoesNotMatch)")
        public = replace(bucket, public_url=bucket.url)
        assert asyncio.run(check_storage(public)).startswith("get: the storage answered 4")

    @pytest.mark.parametrize(
        ("answers", "told"),
        [
            (
                [200, (403, "AccessDenied")],
                "get: the storage answered 403 Forbidden (AccessDenied)",
            ),
            ([200, 200], "get: the storage answered with something else than was put there"),
            ([500], "put: the storage answered 500 Internal Server Error"),
            ([5.0], "put: the storage took longer than 0.3 seconds in all"),
        ],
    )
    def test_each_step_is_told_apart(
        self, answers: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(upload_module, "CHECK_SECONDS", 0.3)

        async def check() -> str:
            async with failing(Faults(*answers)) as url:
                where = Bucket(url, "x", ACCESS_KEY_ID, "hunter2", private_allowed=True)
                return await check_storage(where)

        assert asyncio.run(check()).startswith(told)

    def test_addresses_cannot_be_checked(self) -> None:
        where = PutUrls(("https://a/b",), private_allowed=False)
        assert asyncio.run(check_storage(where)).startswith("not checked")
