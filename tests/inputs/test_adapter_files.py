"""Adapters' files from servers and from LORA_DIR, and what either can do wrong."""

import asyncio
import contextlib
import errno
import gzip
import hashlib
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import (
    adapter_cache,
    adapter_download,
    adapter_files,
    adapter_hosts,
    adapter_sources,
)
from sdxl_worker.inputs.adapter_files import AdapterFile, fetch_adapters
from sdxl_worker.settings import Settings
from tests.adapter_servers import Fault, Server, adapter, serving

FIELD = "loras[0].path"
SECRETS = ("hunter2", "hub-token", "civitai-token")
COMMIT = "0123456789" * 4
A, B = adapter(seed=0), adapter(seed=1)
LARGE = adapter(5_000_000)


class Place:
    """Servers, and a worker that fetches from them."""

    def __init__(self, hub: Server, civitai: Server, storage: Server, settings: Settings) -> None:
        self.hub = hub
        self.civitai = civitai
        self.storage = storage
        self.settings = settings
        self.told: list[tuple[int, int | None]] = []

    @property
    def cache(self) -> Path:
        assert self.settings.lora_cache_dir is not None
        return self.settings.lora_cache_dir

    def with_settings(self, **changed: Any) -> Settings:
        return self.settings.model_copy(update=changed)

    async def fetch_all(
        self, paths: dict[str, str], settings: Settings | None = None
    ) -> dict[str, AdapterFile]:
        return await fetch_adapters(
            paths, settings or self.settings, lambda *told: self.told.append(told)
        )

    async def fetch(self, path: str, settings: Settings | None = None) -> AdapterFile:
        return (await self.fetch_all({FIELD: path}, settings))[FIELD]

    async def refusal(self, path: str, settings: Settings | None = None) -> str:
        with pytest.raises(RequestError) as caught:
            await self.fetch(path, settings)
        told = str(caught.value)
        assert told.startswith(f"{FIELD}: ")
        assert "\n" not in told
        assert not any(secret in told for secret in SECRETS)
        assert str(self.cache.parent) not in told
        return told

    def left(self, suffix: str) -> list[str]:
        return sorted(path.name for path in self.cache.glob(f"*{suffix}"))


Scene = Callable[[Place], Awaitable[None]]
Play = Callable[[Scene], None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Play:
    """Runs a scene. What it logs must be free of secrets."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.setattr(adapter_files, "PROGRESS_SECONDS", 0.005)
    caplog.set_level(logging.DEBUG)

    async def run(scene: Scene) -> None:
        async with serving() as hub, serving() as civitai, serving() as storage:
            monkeypatch.setattr(adapter_sources, "CIVITAI", (civitai.url,))
            settings = Settings(
                lora_cache_dir=tmp_path / "cache",
                hf_endpoint=hub.url,
                hf_token=SecretStr("hub-token"),
                civitai_token=SecretStr("civitai-token"),
            )
            await scene(Place(hub, civitai, storage, settings))

    def play(scene: Scene) -> None:
        asyncio.run(run(scene))
        ours = [one for one in caplog.records if one.name.startswith("sdxl_worker")]
        assert not any(secret in one.getMessage() for one in ours for secret in SECRETS)

    return play


def test_a_file_is_fetched_checked_and_kept(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/a.safetensors"] = A
        file = await place.fetch(f"{place.storage.url}/a.safetensors?key=hunter2")
        assert file.path.read_bytes() == A
        assert file.sha256 == hashlib.sha256(A).hexdigest()
        assert file.name == f"{place.storage.url}/a.safetensors"
        assert file.header.metadata == {"ss_network_dim": "4"}
        assert place.storage.paths() == ["/a.safetensors?key=hunter2"]
        assert place.told[-1] == (len(A), len(A))
        assert place.left(".part") == []

        again = await place.fetch(f"{place.storage.url}/a.safetensors?key=hunter2")
        assert again == file
        assert again.header.shapes == file.header.shapes
        assert len(place.storage.seen) == 1

    play(scene)


def test_nothing_of_a_secret_is_stored(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.hub.files["/a/b/resolve/main/c.safetensors"] = A
        place.storage.files["/a.safetensors"] = A
        await place.fetch("a/b/c.safetensors")
        await place.fetch(f"{place.storage.url}/a.safetensors?key=hunter2")
        kept = "".join(path.read_text() for path in place.cache.glob("*.json"))
        kept += " ".join(place.left(""))
        assert not any(secret in kept for secret in SECRETS)

    play(scene)


# --- the Hub and Civitai -----------------------------------------------------------------------


def test_a_token_is_sent_to_the_hub_and_not_to_its_storage(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.hub.redirects["/a/b/resolve/main/c.safetensors"] = f"{place.storage.url}/x?sign=s"
        place.storage.files["/x"] = A
        file = await place.fetch("a/b/c.safetensors")
        assert (file.name, file.path.read_bytes()) == ("a/b/c.safetensors", A)
        assert place.hub.tokens() == ["Bearer hub-token"]
        assert place.storage.tokens() == [None]

    play(scene)


def test_a_token_is_sent_to_civitai_and_not_to_its_storage(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.civitai.redirects["/api/download/models/5"] = f"{place.storage.url}/x?sign=hunter2"
        place.storage.files["/x"] = A
        file = await place.fetch(f"{place.civitai.url}/models/3/name?modelVersionId=5")
        assert file.name == f"{place.civitai.url}/api/download/models/5"
        assert place.civitai.tokens() == ["Bearer civitai-token"]
        assert place.storage.tokens() == [None]

    play(scene)


def test_no_token_goes_to_any_other_address(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x.safetensors"] = A
        await place.fetch(f"{place.storage.url}/x.safetensors")
        assert place.storage.tokens() == [None]

    play(scene)


def test_without_tokens_none_is_sent(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.hub.files["/a/b/resolve/main/c.safetensors"] = A
        await place.fetch("a/b/c.safetensors", place.with_settings(hf_token=None))
        assert place.hub.tokens() == [None]

    play(scene)


def test_hf_hub_offline_blocks_nothing(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    async def scene(place: Place) -> None:
        place.hub.files["/a/b/resolve/main/c.safetensors"] = A
        assert (await place.fetch("a/b/c.safetensors")).path.read_bytes() == A

    play(scene)


def test_a_repository_is_asked_for_its_only_file(play: Play) -> None:
    async def scene(place: Place) -> None:
        listing = b'{"siblings": [{"rfilename": "README.md"}, {"rfilename": "x/c.safetensors"}]}'
        place.hub.files["/api/models/a/b"] = listing
        place.hub.files["/a/b/resolve/main/x/c.safetensors"] = A
        file = await place.fetch("a/b")
        assert (file.name, file.path.read_bytes()) == ("a/b/x/c.safetensors", A)
        assert (await place.fetch("a/b")).name == "a/b/x/c.safetensors"
        assert len(place.hub.seen) == 2

    play(scene)


def test_a_model_on_civitai_is_asked_for_its_newest_version(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.civitai.files["/api/v1/models/3"] = b'{"modelVersions": [{"id": 9}, {"id": 5}]}'
        place.civitai.files["/api/download/models/9"] = A
        file = await place.fetch(f"{place.civitai.url}/models/3/name")
        assert file.name == f"{place.civitai.url}/api/download/models/9"

    play(scene)


@pytest.mark.parametrize("listing", [b"<html>", b"[" * 100_000])
def test_a_listing_that_is_no_json_is_told(play: Play, listing: bytes) -> None:
    async def scene(place: Place) -> None:
        place.hub.files["/api/models/a/b"] = listing
        assert "no JSON" in await place.refusal("a/b")

    play(scene)


def test_a_listing_without_end_is_told(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_hosts, "MAX_LISTING_BYTES", 1_000_000)

    async def scene(place: Place) -> None:
        place.hub.files["/api/models/a/b"] = b"{"
        place.hub.faults["/api/models/a/b"] = [Fault(endless=True)]
        assert "too long" in await place.refusal("a/b")

    play(scene)


@pytest.mark.parametrize(
    ("refused", "token", "reason"),
    [
        ((401, {}), None, "it is private: then the worker's owner has to set HF_TOKEN"),
        ((403, {}), "hub-token", "the worker's HF_TOKEN is not valid or may not read it"),
        ((403, {"X-Error-Code": "GatedRepo"}), "hub-token", "is gated: its conditions have to be"),
        ((401, {"X-Error-Code": "GatedRepo"}), None, "sets as HF_TOKEN"),
        ((404, {"X-Error-Code": "EntryNotFound"}), None, "no such file in it"),
        ((404, {"X-Error-Code": "RevisionNotFound"}), None, "no such revision of it"),
        ((404, {}), None, "no such repository or file"),
        ((418, {}), None, "answered 418"),
        ((503, {}), None, "answered 503 Service Unavailable; try again later"),
    ],
)
def test_what_the_hub_refuses(
    play: Play, refused: tuple[int, dict[str, str]], token: str | None, reason: str
) -> None:
    async def scene(place: Place) -> None:
        place.hub.refusals["/a/b/resolve/main/c.safetensors"] = refused
        settings = place.with_settings(hf_token=token and SecretStr(token))
        assert reason in await place.refusal("a/b/c.safetensors", settings)
        assert len(place.hub.seen) == 1

    play(scene)


@pytest.mark.parametrize(
    ("status", "token", "reason"),
    [
        (401, None, "wants a login for this file; the worker's owner has to set CIVITAI_TOKEN"),
        (403, "civitai-token", "CIVITAI_TOKEN is not valid, or its account may not have the file"),
        (404, None, "Civitai has no such file"),
    ],
)
def test_what_civitai_refuses(play: Play, status: int, token: str | None, reason: str) -> None:
    async def scene(place: Place) -> None:
        place.civitai.refusals["/api/download/models/5"] = status, {}
        settings = place.with_settings(civitai_token=token and SecretStr(token))
        path = f"{place.civitai.url}/api/download/models/5?token=hunter2"
        assert reason in await place.refusal(path, settings)

    play(scene)


def test_civitai_s_page_to_log_in_is_no_file(play: Play) -> None:
    async def scene(place: Place) -> None:
        login = "/login?returnUrl=%2Fmodels&reason=download-auth"
        place.civitai.redirects["/api/download/models/5"] = login
        place.civitai.files["/login"] = b"<!DOCTYPE html>"
        path = f"{place.civitai.url}/api/download/models/5"
        told = await place.refusal(path, place.with_settings(civitai_token=None))
        assert "has to set CIVITAI_TOKEN" in told

    play(scene)


# --- which hosts -------------------------------------------------------------------------------


@pytest.fixture
def private_refused(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.delenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS")


@pytest.mark.usefixtures("private_refused")
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "169.254.169.254", "[::1]", "0x7f.1"])
def test_private_addresses_are_not_connected_to(play: Play, host: str) -> None:
    async def scene(place: Place) -> None:
        assert "public addresses only" in await place.refusal(f"https://{host}/a.safetensors")

    play(scene)


@pytest.mark.usefixtures("private_refused")
def test_the_owner_s_mirror_of_the_hub_may_be_private_but_nothing_it_redirects_to(
    play: Play,
) -> None:
    async def scene(place: Place) -> None:
        place.hub.files["/a/b/resolve/main/c.safetensors"] = A
        assert (await place.fetch("a/b/c.safetensors")).path.read_bytes() == A
        place.hub.redirects["/a/b/resolve/main/d.safetensors"] = f"{place.storage.url}/x"
        assert "redirects to something that is not https" in await place.refusal(
            "a/b/d.safetensors"
        )
        https = place.storage.url.replace("http:", "https:")
        place.hub.redirects["/a/b/resolve/main/e.safetensors"] = f"{https}/x"
        assert "public addresses only" in await place.refusal("a/b/e.safetensors")
        assert place.storage.seen == []

    play(scene)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("/loop?key=hunter2", "redirects more than 5 times"),
        ("ftp://127.0.0.1/hunter2", "not https://"),
        ("file:///etc/hunter2", "not https://"),
        ("http://]a[@/", "not an address"),
        ("", "redirects to nowhere"),
    ],
)
def test_a_wrong_redirect_is_told(play: Play, location: str, reason: str) -> None:
    async def scene(place: Place) -> None:
        place.storage.redirects["/loop"] = location
        assert reason in await place.refusal(f"{place.storage.url}/loop")

    play(scene)


# --- servers that do wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><title>Log in</title>", "a web page, perhaps one to log in"),
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "a PyTorch pickle"),
        (b'{"error": "hunter2"}', "JSON"),
        ((100 * 1024**3).to_bytes(8, "little") + b'{"a": 1}', "damaged"),
        (A[:20], "cut off"),
        (A[:-1], "cut off"),
        (A + b"x", "damaged"),
    ],
    ids=["page", "empty", "pickle", "json", "long header", "cut header", "cut", "longer"],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_another_file_is_named_and_not_kept(
    play: Play, content: bytes, what: str, is_chunked: bool
) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/a"] = content
        place.storage.faults["/a"] = [Fault(is_chunked=is_chunked)] * 2
        told = await place.refusal(f"{place.storage.url}/a")
        # Where no length is told, nobody knows how long the header should have been.
        unknown = is_chunked and content == A[:20]
        assert f"the file is {'damaged' if unknown else what}" in told
        assert place.left("") == []

    play(scene)


def test_a_body_is_not_fetched_before_its_header_is_checked(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/a"] = b"<html>" + bytes(2000)
        place.storage.faults["/a"] = [Fault(stall_after=1500)]
        assert "a web page" in await place.refusal(f"{place.storage.url}/a")

    play(scene)


def test_a_body_without_end_is_cut_where_its_header_says(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/a"] = A
        place.storage.faults["/a"] = [Fault(endless=True)]
        assert "more follows its last tensor" in await place.refusal(f"{place.storage.url}/a")
        assert place.left("") == []

    play(scene)


def test_a_length_that_is_wrong_is_told(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/a"] = A
        place.storage.faults["/a"] = [Fault(length=len(A) + 100, drop_after=len(A))]
        assert "100 bytes follow its last tensor" in await place.refusal(f"{place.storage.url}/a")

    play(scene)


def test_a_file_over_the_limit_is_told_by_its_header(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/a"] = LARGE
        place.storage.faults["/a"] = [Fault(stall_after=2000)]
        settings = place.with_settings(lora_cache_gb=0.004)
        told = await place.refusal(f"{place.storage.url}/a", settings)
        assert "it has 0.01 GB, and this worker takes at most 0.00 GB" in told
        assert place.left("") == []

    play(scene)


def test_a_compressed_body_is_taken_though_it_was_not_asked_for(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = gzip.compress(A)
        place.storage.faults["/x"] = [Fault(headers={"Content-Encoding": "gzip"})]
        assert (await place.fetch(f"{place.storage.url}/x")).path.read_bytes() == A
        assert place.storage.seen[0].headers["Accept-Encoding"] == "identity"

    play(scene)


def test_a_broken_connection_is_taken_up_where_it_broke(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.hub.redirects["/a/b/resolve/main/c.safetensors"] = f"{place.storage.url}/x"
        place.storage.files["/x"] = LARGE
        place.storage.faults["/x"] = [Fault(drop_after=3_000_000)]
        file = await place.fetch("a/b/c.safetensors")
        assert file.path.read_bytes() == LARGE
        assert file.sha256 == hashlib.sha256(LARGE).hexdigest()
        ranges = [request.headers.get("Range") for request in place.storage.seen]
        assert ranges[0] is None
        assert ranges[1] is not None
        assert ranges[1] != "bytes=0-"

    play(scene)


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"1"'}], ids=["none", "weak"])
def test_without_a_strong_etag_a_file_is_fetched_anew(play: Play, headers: dict[str, str]) -> None:
    async def scene(place: Place) -> None:
        place.storage.etags = False
        place.storage.files["/x"] = LARGE
        place.storage.faults["/x"] = [Fault(drop_after=3_000_000, headers=headers)]
        file = await place.fetch(f"{place.storage.url}/x")
        assert file.path.read_bytes() == LARGE
        assert [request.headers.get("Range") for request in place.storage.seen] == [None, None]

    play(scene)


def test_a_file_that_changes_between_two_tries_is_not_mixed(play: Play) -> None:
    other = adapter(6_000_000, seed=1)

    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        place.storage.faults["/x"] = [Fault(drop_after=3_000_000)]

        async def change() -> None:
            while not place.storage.seen:
                await asyncio.sleep(0)
            place.storage.files["/x"] = other

        changing = asyncio.create_task(change())
        assert (await place.fetch(f"{place.storage.url}/x")).path.read_bytes() == other
        await changing

    play(scene)


def test_a_wrong_part_is_refused(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        wrong = {"Content-Range": f"bytes 5-{len(LARGE) - 1}/{len(LARGE)}"}
        place.storage.faults["/x"] = [Fault(drop_after=3_000_000), Fault(headers=wrong)]
        told = await place.refusal(f"{place.storage.url}/x")
        assert "another part than it was asked for" in told
        assert place.left("") == []

    play(scene)


def test_there_is_one_more_try_and_no_third(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        place.storage.faults["/x"] = [Fault(drop_after=3_000_000), Fault(drop_after=1000)]
        assert "broke off" in await place.refusal(f"{place.storage.url}/x")
        assert len(place.storage.seen) == 2
        assert place.left("") == []

    play(scene)


@pytest.mark.parametrize("after", [0, 100, 2000])
def test_a_server_that_stalls_is_left(
    play: Play, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(adapter_hosts, "STALL_SECONDS", 0.2)

    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        place.storage.faults["/x"] = [Fault(stall_after=after)] * 2
        began = time.monotonic()
        assert "sent nothing for 0.2 seconds" in await place.refusal(f"{place.storage.url}/x")
        assert 0.4 <= time.monotonic() - began < 5
        assert place.left("") == []
        await closed(place.storage)

    play(scene)


def test_a_server_that_drips_is_left_in_time(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_download, "DOWNLOAD_SECONDS", 0.5)

    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        place.storage.faults["/x"] = [Fault(stall_after=2000)]
        began = time.monotonic()
        assert "within 0.5 seconds" in await place.refusal(f"{place.storage.url}/x")
        assert time.monotonic() - began < 5
        assert place.left("") == []
        assert len(place.storage.seen) == 1

    play(scene)


async def closed(server: Server) -> None:
    """Within a second, all connections to it are."""
    deadline = time.monotonic() + 1
    while server.open and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert server.open == 0


# --- jobs --------------------------------------------------------------------------------------


def test_files_of_a_job_come_side_by_side_and_progress_counts_all(play: Play) -> None:
    async def scene(place: Place) -> None:
        files = {f"/{i}": adapter(1_500_000, seed=i) for i in range(4)}
        place.storage.files |= files
        for path in files:
            place.storage.faults[path] = [Fault(stall_after=1_200_000)]
        names = {path: f"{place.storage.url}{path}" for path in files}
        fetching = asyncio.create_task(place.fetch_all(names))
        while len(place.storage.seen) < 4 or not place.told or place.told[-1][0] < 4_800_000:
            await asyncio.sleep(0.01)
        total = sum(len(content) for content in files.values())
        assert place.told[-1] == (4_800_000, total)
        for request in place.storage.seen:
            assert request.transport is not None
            request.transport.close()  # the rest comes at the second try
        fetched = await fetching
        assert {path: file.path.read_bytes() for path, file in fetched.items()} == files
        assert place.told[-1] == (total, total)

    play(scene)


def test_the_sum_is_not_told_before_it_is_known(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files |= {"/a": A, "/b": B}
        place.storage.faults["/b"] = [Fault(stall_after=10)]
        job = asyncio.create_task(
            place.fetch_all({path: f"{place.storage.url}/{path}" for path in ("a", "b")})
        )
        await until(lambda: (len(A), None) in place.told)
        job.cancel()
        await asyncio.wait([job])
        assert {total for _, total in place.told} == {None}

    play(scene)


def test_no_more_than_16_files(play: Play) -> None:
    async def scene(place: Place) -> None:
        with pytest.raises(RequestError, match=r"^loras\[16\].path: a job may name 16 files"):
            await place.fetch_all({f"loras[{i}].path": "a/b" for i in range(17)})

    play(scene)


def test_the_field_that_is_to_blame_is_named(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/a"] = A
        for wrong in (f"{place.storage.url}/none", "none.safetensors"):
            with pytest.raises(RequestError, match=r"^loras\[1\].path: "):
                await place.fetch_all(
                    {"loras[0].path": f"{place.storage.url}/a", "loras[1].path": wrong}
                )

    play(scene)


def test_a_file_that_many_wait_for_is_fetched_once(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        place.storage.files["/y"] = A
        path = f"{place.storage.url}/x"
        jobs = [place.fetch_all({"loras[0].path": path, "loras[1].path": path}) for _ in range(8)]
        fetched = await asyncio.gather(*jobs)
        assert {file.sha256 for files in fetched for file in files.values()} == {
            hashlib.sha256(LARGE).hexdigest()
        }
        assert len(place.storage.seen) == 1
        assert place.told[-1] == (len(LARGE), len(LARGE))

    play(scene)


def test_a_failure_reaches_all_who_wait_each_with_its_field(play: Play) -> None:
    async def scene(place: Place) -> None:
        path = f"{place.storage.url}/none"
        jobs = [place.fetch_all({f"loras[{i}].path": path}) for i in range(3)]
        told = await asyncio.gather(*jobs, return_exceptions=True)
        assert [str(one).partition(":")[0] for one in told] == [
            f"loras[{i}].path" for i in range(3)
        ]
        assert len(place.storage.seen) == 1
        assert "answered 404" in await place.refusal(path), "a failure is not remembered"
        assert len(place.storage.seen) == 2

    play(scene)


def test_one_who_leaves_does_not_end_it_for_the_others_and_the_last_does(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        place.storage.faults["/x"] = [Fault(stall_after=2_000_000)]
        path = f"{place.storage.url}/x"
        jobs = [asyncio.create_task(place.fetch(path)) for _ in range(3)]
        await until(lambda: bool(place.left(".part")))
        for job in jobs[:2]:
            job.cancel()
        await asyncio.wait(jobs[:2])
        await asyncio.sleep(0.1)
        assert place.storage.open == 1
        assert place.left(".part") != []
        jobs[2].cancel()
        await asyncio.wait(jobs)
        assert all(job.cancelled() for job in jobs)
        await closed(place.storage)
        await until(lambda: not place.left(""))
        told = len(place.told)
        assert (await place.fetch(path)).path.read_bytes() == LARGE
        assert len(place.storage.seen) == 2
        assert told

    play(scene)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_who_comes_while_the_last_leaves_begins_anew(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending: list[bool] = []

    async def slow_to_end(*args: Any) -> AdapterFile:
        try:
            return await adapter_download.cached_or_fetched(*args)
        except asyncio.CancelledError:
            ending.append(True)
            await asyncio.sleep(0.3)
            raise

    monkeypatch.setattr(adapter_files, "cached_or_fetched", slow_to_end)

    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        place.storage.faults["/x"] = [Fault(stall_after=2000)]
        job = asyncio.create_task(place.fetch(f"{place.storage.url}/x"))
        await until(lambda: bool(place.left(".part")))
        job.cancel()
        await until(lambda: bool(ending))
        assert (await place.fetch(f"{place.storage.url}/x")).path.read_bytes() == LARGE

    play(scene)


def test_a_cancelled_job_leaves_nothing_at_whatever_moment(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.hub.redirects["/a/b/resolve/main/c.safetensors"] = f"{place.storage.url}/x"
        place.storage.files["/x"] = adapter(20_000_000)
        for i in range(40):
            job = asyncio.create_task(place.fetch("a/b/c.safetensors"))
            await asyncio.sleep(0.002 * i)
            job.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await job
            if job.cancelled():
                await closed(place.storage)
                await until(lambda: not place.left(".part"))
        assert (await place.fetch("a/b/c.safetensors")).path.read_bytes()[-9:]
        assert adapter_files._shared == {}

    play(scene)


def test_nothing_is_told_after_a_job_has_left(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        place.storage.faults["/x"] = [Fault(stall_after=2_000_000)]
        job = asyncio.create_task(place.fetch(f"{place.storage.url}/x"))
        await until(lambda: bool(place.told))
        told = len(place.told)
        job.cancel()
        time.sleep(0.1)  # meanwhile the connections' thread tells more
        await asyncio.wait([job])
        await asyncio.sleep(0.1)
        assert len(place.told) == told

    play(scene)


# --- the cache ---------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_download, "FRESH_SECONDS", 0)


@pytest.mark.usefixtures("nothing_is_fresh")
class TestAskingAgain:
    def test_what_has_not_changed_is_not_sent_again(self, play: Play) -> None:
        async def scene(place: Place) -> None:
            place.storage.files["/x"] = A
            path = f"{place.storage.url}/x"
            assert await place.fetch(path) == await place.fetch(path) == await place.fetch(path)
            asked = [request.headers.get("If-None-Match") for request in place.storage.seen]
            assert asked[0] is None
            assert asked[1] == asked[2] is not None
            assert place.left(".part") == []

        play(scene)

    def test_what_has_changed_takes_the_place(self, play: Play) -> None:
        async def scene(place: Place) -> None:
            path = f"{place.storage.url}/x"
            for content in (A, B, A):
                place.storage.files["/x"] = content
                assert (await place.fetch(path)).path.read_bytes() == content

        play(scene)

    def test_a_commit_is_not_asked_for_again(self, play: Play) -> None:
        async def scene(place: Place) -> None:
            place.hub.files[f"/a/b/resolve/{COMMIT}/c.safetensors"] = A
            for _ in range(3):
                await place.fetch(f"a/b/c.safetensors@{COMMIT}")
            assert len(place.hub.seen) == 1

        play(scene)

    @pytest.mark.parametrize(
        "fault", [Fault(status=503), Fault(status=429), Fault(drop_after=0), Fault(drop_after=900)]
    )
    def test_a_server_that_cannot_be_reached_is_done_without(
        self, play: Play, fault: Fault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scene(place: Place) -> None:
            place.storage.files["/x"] = A
            path = f"{place.storage.url}/x"
            first = await place.fetch(path)
            place.storage.files["/x"] = B
            place.storage.faults["/x"] = [fault]
            assert await place.fetch(path) == first
            assert len(place.storage.seen) == 2
            assert place.left(".part") == []
            monkeypatch.setattr(adapter_download, "FRESH_SECONDS", 300)
            assert await place.fetch(path) == first
            assert len(place.storage.seen) == 2, "it is asked again at once"

        play(scene)

    def test_a_file_that_is_no_longer_open_to_the_worker_is_not_given(self, play: Play) -> None:
        async def scene(place: Place) -> None:
            place.hub.files["/a/b/resolve/main/c.safetensors"] = A
            await place.fetch("a/b/c.safetensors")
            place.hub.refusals["/a/b/resolve/main/c.safetensors"] = 403, {}
            assert "may not read it" in await place.refusal("a/b/c.safetensors")

        play(scene)


def test_it_is_asked_again_after_some_minutes(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = A
        path, now = f"{place.storage.url}/x", time.time()
        await place.fetch(path)
        for seconds, requests in ((290, 1), (310, 2), (600, 2), (620, 3), (-100, 4)):
            monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds)
            await place.fetch(path)
            assert len(place.storage.seen) == requests

    play(scene)


def test_another_query_or_token_is_another_file(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = A
        await place.fetch(f"{place.storage.url}/x?key=1")
        await place.fetch(f"{place.storage.url}/x?key=2")
        assert place.storage.paths() == ["/x?key=1", "/x?key=2"]
        assert len(place.left(".safetensors")) == 1, "the same contents are stored once"
        place.hub.files["/a/b/resolve/main/c.safetensors"] = A
        await place.fetch("a/b/c.safetensors")
        await place.fetch("a/b/c.safetensors", place.with_settings(hf_token=SecretStr("other")))
        assert place.hub.tokens() == ["Bearer hub-token", "Bearer other"]

    play(scene)


def test_a_damaged_cache_is_fetched_again(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = A
        path = f"{place.storage.url}/x"

        def cut(file: AdapterFile) -> None:
            file.path.write_bytes(A[:-1])

        def remove(file: AdapterFile) -> None:
            file.path.unlink()

        def garble(_: AdapterFile) -> None:
            for entry in place.cache.glob("*.json"):
                entry.write_text('{"sha256": 1}')

        for i, damage in enumerate((cut, remove, garble)):
            damage(await place.fetch(path))
            assert (await place.fetch(path)).path.read_bytes() == A
            assert len(place.storage.seen) == i + 2

    play(scene)


def test_those_not_used_for_longest_go_first_and_none_in_use(play: Play) -> None:
    async def scene(place: Place) -> None:
        contents = {f"/{i}": adapter(1_000_000, seed=i) for i in range(5)}
        place.storage.files |= contents
        size = len(contents["/0"])
        settings = place.with_settings(lora_cache_gb=3.5 * size / 1e9)

        async def fetch(i: int) -> AdapterFile:
            file = await place.fetch(f"{place.storage.url}/{i}", settings)
            assert file.path.read_bytes() == contents[f"/{i}"]
            return file

        def there() -> set[int]:
            hashes = {hashlib.sha256(one).hexdigest(): i for i, one in enumerate(contents.values())}
            return {hashes[name.partition(".")[0]] for name in place.left(".safetensors")}

        for i in range(3):
            await fetch(i)
        await fetch(0)
        await fetch(3)
        assert there() == {0, 2, 3}, "1 was not used for longest"
        held = await fetch(2)
        await fetch(0)
        await fetch(3)
        await fetch(1)
        assert there() == {1, 2, 3}, "2 is in use, 0 was not used for longest"
        everything = [held, *[await fetch(i) for i in (0, 1, 3, 4)]]
        assert there() == {0, 1, 2, 3, 4}, "all are in use"
        del held, everything
        await fetch(0)
        place.storage.files["/5"] = adapter(1_000_000, seed=5)
        contents["/5"] = place.storage.files["/5"]
        await fetch(5)
        assert len(there()) == 3
        assert {0, 5} <= there()

    play(scene)


def test_files_that_are_coming_count(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files |= {f"/{i}": adapter(1_000_000, seed=i) for i in range(3)}
        place.storage.faults["/1"] = [Fault(stall_after=2000)]
        settings = place.with_settings(lora_cache_gb=2.5e6 / 1e9)
        url = place.storage.url
        await place.fetch(f"{url}/0", settings)
        coming = asyncio.create_task(place.fetch(f"{url}/1", settings))
        await until(lambda: bool(place.left(".part")))
        await place.fetch(f"{url}/2", settings)
        assert len(place.left(".safetensors")) == 1
        coming.cancel()
        await asyncio.wait([coming])

    play(scene)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_is_told_and_leaves_nothing(
    play: Play, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write, written = os.write, []

    def failing(descriptor: int, data: memoryview) -> int:
        if len(data) > 1000:
            written.append(len(data))
            if len(written) > 2:
                raise OSError(code, "hunter2")
        return write(descriptor, data)

    async def scene(place: Place) -> None:
        place.storage.files["/x"] = LARGE
        monkeypatch.setattr(os, "write", failing)
        told = await place.refusal(f"{place.storage.url}/x")
        assert ("disk is full" in told) == (code != errno.EIO)
        assert ("cannot keep it on its disk (EIO)" in told) == (code == errno.EIO)
        assert "LORA_CACHE_DIR" in told
        assert place.left("") == []
        monkeypatch.setattr(os, "write", write)
        assert (await place.fetch(f"{place.storage.url}/x")).path.read_bytes() == LARGE

    play(scene)


def test_a_disk_without_room_is_told_before_the_body_comes(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = adapter_cache.shutil.disk_usage

    async def scene(place: Place) -> None:
        place.storage.files |= {"/a": A, "/x": LARGE}
        await place.fetch(f"{place.storage.url}/a")
        full = usage(place.cache)._replace(free=len(LARGE) - len(A))
        monkeypatch.setattr(adapter_cache.shutil, "disk_usage", lambda _: full)
        held = await place.fetch(f"{place.storage.url}/a")
        place.storage.faults["/x"] = [Fault(stall_after=2000)]
        assert "disk is full" in await place.refusal(f"{place.storage.url}/x")
        del held
        await place.fetch(f"{place.storage.url}/x")
        assert len(place.left(".safetensors")) == 1, "what was not used made room"

    play(scene)


WORKER = """
import asyncio, sys
from pathlib import Path
from sdxl_worker.inputs.adapter_files import fetch_adapters
from sdxl_worker.settings import Settings

async def main():
    for _ in range(10):
        for path in sys.argv[1:]:
            file = (await fetch_adapters({"a": path}, Settings(), lambda *_: None))["a"]
            print(file.sha256, len(file.path.read_bytes()), flush=True)

asyncio.run(main())
"""


async def worker(place: Place, *paths: str, budget_gb: float = 1) -> asyncio.subprocess.Process:
    environment = {
        "PATH": os.environ["PATH"],
        "LORA_CACHE_DIR": str(place.cache),
        "LORA_CACHE_GB": str(budget_gb),
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
    }
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        WORKER,
        *paths,
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )


def test_workers_share_a_folder(play: Play) -> None:
    """With room for two of three files, each removes what the others do not use just now."""

    async def scene(place: Place) -> None:
        contents = [adapter(1_000_000, seed=i) for i in range(3)]
        place.storage.files |= {f"/{i}": content for i, content in enumerate(contents)}
        paths = [f"{place.storage.url}/{i}" for i in range(3)]
        workers = [await worker(place, *paths, budget_gb=0.0025) for _ in range(3)]
        expected = [
            f"{hashlib.sha256(content).hexdigest()} {len(content)}" for content in contents
        ] * 10
        for one in workers:
            output, _ = await one.communicate()
            assert output.decode().splitlines() == expected
        assert place.left(".part") == []

    play(scene)


def test_what_a_killed_worker_left_is_removed(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(place: Place) -> None:
        place.storage.files |= {"/a": A, "/b": B, "/x": LARGE}
        place.storage.faults["/x"] = [Fault(stall_after=3_000_000)]
        one = await worker(place, f"{place.storage.url}/x")
        await until(lambda: bool(place.left(".part")))
        monkeypatch.setattr(adapter_cache, "LEFTOVER_SECONDS", -1)
        await place.fetch(f"{place.storage.url}/a")
        assert len(place.left(".part")) == 1, "it is still being written"
        one.kill()
        await one.wait()
        await place.fetch(f"{place.storage.url}/b")
        assert place.left(".part") == []

    play(scene)


def test_a_copy_of_a_file_in_use_does_not_take_its_place(play: Play) -> None:
    async def scene(place: Place) -> None:
        place.storage.files |= {"/x": A, "/y": A, "/z": B}
        used = await place.fetch(f"{place.storage.url}/x")
        await place.fetch(f"{place.storage.url}/y")
        settings = place.with_settings(lora_cache_gb=len(A) / 1e9)
        await place.fetch(f"{place.storage.url}/z", settings)
        assert used.path.read_bytes() == A
        assert len(place.left(".safetensors")) == 2

    play(scene)


def test_what_the_owner_keeps_in_the_folder_is_not_touched(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_cache, "LEFTOVER_SECONDS", -1)

    async def scene(place: Place) -> None:
        place.storage.files["/x"] = A
        names = ["mine.safetensors", "mine.json", "mine.part"]
        place.cache.mkdir()
        for name in names:
            (place.cache / name).write_bytes(B)
        settings = place.with_settings(lora_cache_gb=len(A) / 1e9)
        await place.fetch(f"{place.storage.url}/x", settings)
        assert all((place.cache / name).read_bytes() == B for name in names)

    play(scene)


def test_entries_do_not_gather(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_cache, "MAX_ENTRIES", 5)

    async def scene(place: Place) -> None:
        place.storage.files["/x"] = A
        for i in range(10):
            await place.fetch(f"{place.storage.url}/x?signature={i}")
        assert len(place.left(".json")) <= 6
        (place.cache / f"{hashlib.sha256(A).hexdigest()}.safetensors").unlink()
        place.storage.files["/y"] = B
        await place.fetch(f"{place.storage.url}/y")
        assert len(place.left(".json")) == 1, "those without a file go"

    play(scene)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(adapter_cache.tempfile, "tempdir", str(folder))
    return folder / f"sdxl-worker-loras-{os.geteuid()}"


def test_without_a_setting_the_folder_is_temporary_and_private(play: Play, temporary: Path) -> None:
    async def scene(place: Place) -> None:
        place.storage.files["/x"] = A
        settings = place.with_settings(lora_cache_dir=None)
        file = await place.fetch(f"{place.storage.url}/x", settings)
        assert file.path.parent == temporary
        assert temporary.stat().st_mode & 0o777 == 0o700

    play(scene)


@pytest.mark.parametrize("kind", ["open to others", "a link", "of another user"])
def test_a_temporary_folder_that_others_can_use_is_not_used(
    play: Play, temporary: Path, kind: str, tmp_path: Path
) -> None:
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        temporary.symlink_to(tmp_path / "elsewhere")
    else:
        temporary.mkdir(mode=0o700)
    if kind == "open to others":
        temporary.chmod(0o770)
    if kind == "of another user":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(temporary, 1234, 1234)

    async def scene(place: Place) -> None:
        place.storage.files["/x"] = A
        settings = place.with_settings(lora_cache_dir=None)
        assert "LORA_CACHE_DIR" in await place.refusal(f"{place.storage.url}/x", settings)
        assert list(temporary.iterdir()) == []

    play(scene)


def test_a_cache_folder_that_cannot_be_made_is_told(play: Play, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def scene(place: Place) -> None:
        settings = place.with_settings(lora_cache_dir=tmp_path / "file" / "cache")
        told = await place.refusal(f"{place.storage.url}/x", settings)
        assert "has to correct LORA_CACHE_DIR" in told

    play(scene)


# --- LORA_DIR ----------------------------------------------------------------------------------


def test_a_file_in_lora_dir_is_hashed_once(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    sha256 = hashlib.sha256

    def counting(*data: bytes) -> Any:
        hashed.append(1)
        return sha256(*data)

    async def scene(place: Place) -> None:
        settings = place.with_settings(lora_dir=tmp_path)
        (tmp_path / "a.safetensors").write_bytes(A)
        monkeypatch.setattr(adapter_files.hashlib, "sha256", counting)
        for content, hashes in ((A, 1), (A, 1), (B, 2), (B, 2)):
            if (tmp_path / "a.safetensors").read_bytes() != content:
                (tmp_path / "a.safetensors").write_bytes(content)
            file = await place.fetch("a.safetensors", settings)
            assert file.sha256 == sha256(content).hexdigest()
            assert (file.name, file.path) == ("a.safetensors", tmp_path / "a.safetensors")
            assert len(hashed) == hashes
        assert place.told == []

    play(scene)


def test_another_file_in_lora_dir_is_named(play: Play, tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        (tmp_path / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        told = await place.refusal("a.safetensors", place.with_settings(lora_dir=tmp_path))
        assert "the file is a Git LFS pointer" in told

    play(scene)


def test_hashing_ends_when_nobody_waits(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[bytes] = []

    class SlowHash:
        def update(self, data: bytes) -> None:
            hashed.append(data)
            time.sleep(0.01)

    async def scene(place: Place) -> None:
        (tmp_path / "a.safetensors").write_bytes(A)
        monkeypatch.setattr(adapter_files, "HASH_BYTES", 1)
        monkeypatch.setattr(adapter_files.hashlib, "sha256", SlowHash)
        job = asyncio.create_task(
            place.fetch("a.safetensors", place.with_settings(lora_dir=tmp_path))
        )
        await until(lambda: bool(hashed))
        job.cancel()
        await asyncio.wait([job])
        await asyncio.sleep(0.05)
        ended_at = len(hashed)
        await asyncio.sleep(0.1)
        assert len(hashed) == ended_at < len(A)

    play(scene)


def test_all_paths_that_name_nothing_are_told_at_once(tmp_path: Path) -> None:
    paths = {"loras[0].path": "nope", "loras[1].path": "one", "embeddings[0].path": "/etc/a"}
    (tmp_path / "one").write_bytes(b"x")
    with pytest.raises(RequestError) as caught:
        asyncio.run(fetch_adapters(paths, Settings(lora_dir=tmp_path), lambda *_: None))
    told = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in told] == ["loras[0].path", "embeddings[0].path"]
