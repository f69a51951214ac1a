"""`make attack` in short, and that it tells when something breaks."""

import asyncio
import io
import itertools
import json
import logging
import random
import socket
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from benchmarks.attack import __main__ as program
from benchmarks.attack import (
    adapters_on_workers,
    hostile_adapters,
    hostile_pictures,
    in_process,
    job_inputs,
    on_workers,
    tally,
)
from benchmarks.attack.hostile_adapters import HostileFile, behaviours, endless_behaviours
from benchmarks.attack.hostile_addresses import addresses
from benchmarks.attack.hostile_pictures import HostilePicture
from benchmarks.attack.hostile_server import (
    ENDLESS,
    GOOD,
    OTHERS,
    PICTURE,
    TLS,
    Connection,
    HostileServer,
)
from benchmarks.attack.tally import Tally, unreadable, unreadable_answer
from local_endpoint.local import LocalEndpoint
from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.decode import decode, decode_mask
from sdxl_worker.inputs.fetch import fetch
from sdxl_worker.request import Request, parse_request

IN_SHORT = {
    "job-done answers 429, 3 times",
    "job-done answers 400",
    "job-done drops the answer",
    "job-take answers 500, 3 times",
    "job-take hands out a list of junk",
    "job-take hands out a path as id",
    "job-take hands out null as id",
}


PNG = job_inputs.picture_uri()
JPEG = job_inputs.data_uri(hostile_pictures.encoded(hostile_pictures.sample(), "jpeg"), "jpeg")
UPLOAD = {"upload_urls": ["http://a/b?c"]}


@pytest.fixture
def result() -> Tally:
    return Tally("test")


class TestTheWorkerHolds:
    def test_validation(self, result: Tally) -> None:
        in_process.attack_validation(result, parse_request, count=2000, seed=1)
        assert (result.tried, result.breaks) == (2000, [])

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
    def test_decoding(self, result: Tally) -> None:
        pictures = hostile_pictures.small_pictures()
        in_process.attack_decoding(result, lambda data: decode(data, "image_url"), pictures)
        assert result.tried > 80
        assert result.breaks == []

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
    def test_decoding_of_masks(self, result: Tally) -> None:
        pictures = hostile_pictures.small_pictures()
        in_process.attack_decoding_of_masks(result, lambda data: decode_mask(data, "x"), pictures)
        assert result.tried > 80
        assert result.breaks == []

    def test_addresses(self, result: Tally) -> None:
        in_process.attack_addresses(
            result, lambda url: asyncio.run(fetch(url, "image_url")), addresses()
        )
        assert result.tried > 150
        assert result.breaks == []

    def test_addresses_to_upload_to(self, result: Tally) -> None:
        some = [*addresses()[::20], "http://:80/"]
        in_process.attack_addresses(result, program.put, some)
        assert (result.tried, result.breaks) == (len(some), [])

    def test_adapters(self, result: Tally) -> None:
        """But those that take seconds."""
        files = [one for one in hostile_adapters.files() if len(one.data) < 10_000_000]
        some = [one for one in files if not one.zeros and "keys" not in one.name]
        program.attack_networks(result, some)
        assert result.tried > 90
        assert result.breaks == []

    def test_addresses_of_adapters(self, result: Tally) -> None:
        in_process.attack_addresses(result, program.fetch_adapter, addresses())
        assert result.tried > 150
        assert result.breaks == []

    def test_hostile_adapters(self, result: Tally) -> None:
        names = (
            "a good LoRA",
            "a pickle, in loras",
            "nan in .alpha",
            "a LoRA of rank 10^6",
            "half a character as the family",
            "a key of half a character",
        )
        files = [one for one in hostile_adapters.files() if one.name in names]
        paths = (f"../{hostile_adapters.OUTSIDE}/one.safetensors", "linked.safetensors", "none")
        adapters_on_workers.attack_with_adapter_files(result, files, paths, ("../x",))
        assert result.tried == len(names) + 4 + 3 + 3
        assert result.breaks == []

    def test_a_hostile_server_of_adapters(self, result: Tally) -> None:
        names = ["lora", "lora-cut", "lora-longer", "html", "redirect-to-file", "lora-in-drips"]
        adapters_on_workers.attack_with_an_adapter_server(result, names)
        assert result.tried == len(names) + 7
        assert result.breaks == []

    def test_masks(self, result: Tally) -> None:
        masks = [*hostile_pictures.odd_masks(), HostilePicture("noise", b"noise")]
        on_workers.attack_with_pictures(result, masks, "mask_url", on_workers.UNDER_MASK)
        assert (result.tried, result.breaks) == (len(masks), [])

    def test_a_hostile_storage(self, result: Tally) -> None:
        on_workers.attack_with_storage(result, [*GOOD, *OTHERS, "drip"])
        assert result.tried > 30
        assert result.breaks == []

    def test_real_workers(self, result: Tally) -> None:
        on_workers.attack_with_jobs(result, count=6, seed=1)
        assert (result.tried, result.breaks) == (6, [])

    def test_a_hostile_picture_server(self, result: Tally) -> None:
        """All that tells of addresses, and one that never ends."""
        on_workers.attack_with_a_picture_server(result, [*GOOD, *OTHERS, "drip"])
        assert result.tried > 30
        assert result.breaks == []

    def test_a_platform_in_trouble(self, result: Tally) -> None:
        troubles = [one for one in on_workers.TROUBLES if one.name in IN_SHORT]
        assert len(troubles) == len(IN_SHORT)
        on_workers.attack_as_the_platform(result, troubles)
        assert (result.tried, result.breaks) == (len(IN_SHORT), [])


class TestABreakIsTold:
    def test_of_validation(self, result: Tally) -> None:
        def parse(job_input: object) -> object:
            if "seed" in repr(job_input):
                raise KeyError("seed")
            if "width" in repr(job_input):
                raise RequestError('Traceback (most recent call last):\n  File "request.py"')
            if "height" in repr(job_input):
                raise RequestError("x" * 9000)
            return parse_request(job_input)

        in_process.attack_validation(result, parse, count=300, seed=1)
        assert result.held + len(result.breaks) == result.tried == 300
        told = "\n".join(result.breaks)
        for complaint in ("KeyError: 'seed'", "tells of 'Traceback'", "a message of 9000 bytes"):
            assert complaint in told

    def test_of_validation_that_takes_long(
        self, result: Tally, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(in_process, "VALIDATION_MAX_SECONDS", 0.01)
        in_process.attack_validation(result, lambda _: time.sleep(0.02), count=3, seed=1)
        assert len(result.breaks) == 3

    def test_of_decoding(self, result: Tally) -> None:
        def decode_as_it_lies(data: bytes) -> Image.Image:
            return Image.open(io.BytesIO(data)).convert("RGB")

        pictures = list(hostile_pictures.orientations())
        in_process.attack_decoding(result, decode_as_it_lies, pictures)
        assert len(result.breaks) == 3 * 7, "all orientations but the first, in three formats"

    def test_of_decoding_masks(self, result: Tally) -> None:
        def decode_as_it_lies(data: bytes) -> Image.Image:
            return Image.open(io.BytesIO(data)).convert("L")

        masks = list(hostile_pictures.orientations())[:1]
        in_process.attack_decoding_of_masks(result, decode_as_it_lies, masks)
        [told] = result.breaks
        assert "other values than black and white" in told

    def test_of_addresses(self, result: Tally) -> None:
        def fetch_anything(address: str) -> object:
            with socket.create_connection((address.split("/")[2], 80), timeout=5) as connection:
                return connection.recv(1)

        in_process.attack_addresses(result, fetch_anything, ["http://127.0.0.1/a.png"])
        [told] = result.breaks
        assert "a connection to 127.0.0.1 was opened" in told

    def test_of_a_worker(
        self, result: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = tmp_path / "worker.py"
        worker.write_text(
            "import runpod\n"
            "def handler(job):\n"
            "    if job['input'] == {'prompt': 'lists'}:\n"
            "        return {'error': ['one', 'two']}\n"
            "    stop = job['input'] == {'prompt': 'stop'}\n"
            "    return {'error': 'stopping', 'refresh_worker': stop}\n"
            "runpod.serverless.start({'handler': handler})\n"
        )
        inputs = iter([{"prompt": "lists"}, {"prompt": "fine"}, {"prompt": "stop"}])
        monkeypatch.setattr(on_workers, "valid", lambda _: next(inputs))
        monkeypatch.setattr(on_workers, "refused", lambda _: next(inputs))
        monkeypatch.setattr(
            on_workers,
            "real_workers",
            lambda _: LocalEndpoint(worker_command=[sys.executable, str(worker)]),
        )
        on_workers.attack_with_jobs(result, count=3, seed=1)
        assert result.breaks == [
            "{'prompt': 'lists'}: COMPLETED with None",
            "{'prompt': 'stop'}: asked for the worker to be replaced",
        ]

    @pytest.mark.parametrize(
        ("answer", "complaint"),
        [
            ({"status": "COMPLETED", "output": {"images": []}}, None),
            ({"status": "FAILED", "error": "height: must be smaller"}, None),
            ({"status": "FAILED", "error": "<Image object at 0x7f00>"}, "object at 0x"),
            ({"status": "FAILED"}, "not a message"),
            ({"status": "COMPLETED"}, "COMPLETED with None"),
            ({"status": "TIMED_OUT"}, "TIMED_OUT"),
        ],
    )
    def test_of_an_answer(self, answer: dict[str, Any], complaint: str | None) -> None:
        told = unreadable_answer(answer)
        assert told is None if complaint is None else told is not None and complaint in told

    @pytest.mark.parametrize(
        ("asked", "output", "complaint"),
        [
            ({}, {"images": [PNG], "image_url": PNG}, None),
            ({}, {"images": [PNG, PNG], "image_url": PNG}, "not 1 pictures"),
            ({"num_images": 2}, {"images": [PNG], "image_url": PNG}, "not 2 pictures"),
            ({}, {"images": [PNG]}, "image_url is None"),
            ({"duplicate_first": False}, {"images": [PNG]}, None),
            ({"duplicate_first": False}, {"images": [PNG], "image_url": PNG}, "image_url is"),
            ({}, {"images": [JPEG], "image_url": JPEG}, "jpeg in place of png"),
            ({"output_format": "jpeg"}, {"images": [JPEG], "image_url": JPEG}, None),
            (
                {"on_too_large": "jpeg"},
                {"images": [JPEG], "image_url": JPEG, "warning": "it is JPEG"},
                None,
            ),
            ({}, {"images": [PNG[:60]], "image_url": PNG[:60]}, "cannot be read"),
            (
                {},
                {"images": [PNG.replace("png", "webp")], "image_url": PNG.replace("png", "webp")},
                "png as data:image/webp",
            ),
            ({}, {"images": ["http://a/b"], "image_url": "http://a/b"}, "nobody asked for"),
            (UPLOAD, {"images": ["http://a/b"], "image_url": "http://a/b"}, None),
            (UPLOAD, {"images": ["http://a/b"]}, "image_url is None"),
            (UPLOAD, {"images": [PNG], "image_url": PNG}, "without a warning"),
            (UPLOAD, {"images": [PNG], "image_url": PNG, "warning": "not uploaded"}, None),
            (
                UPLOAD,
                {"images": [PNG], "image_url": PNG, "warning": "Traceback"},
                "the message tells of 'Traceback'",
            ),
        ],
    )
    def test_of_pictures(
        self, asked: dict[str, Any], output: dict[str, Any], complaint: str | None
    ) -> None:
        told = unreadable_answer({"status": "COMPLETED", "output": output}, asked=asked)
        assert told is None if complaint is None else told is not None and complaint in told

    def test_of_a_mask(self, result: Tally) -> None:
        """One that should be refused is taken, and one that should be taken is refused."""
        right = {one.name: one for one in hostile_pictures.odd_masks()}
        wrong = [
            replace(right["an empty mask"], is_taken=True),
            replace(right["a full mask"], is_taken=False),
        ]
        on_workers.attack_with_pictures(result, wrong, "mask_url", on_workers.UNDER_MASK)
        assert len(result.breaks) == 2

    def test_of_networks(self, result: Tally) -> None:
        """What is put on and not taken off, and what is taken or refused where it should not be."""
        weights = ["as loaded"]

        def put_on(hostile: HostileFile) -> None:
            if hostile.name == "good":
                raise RequestError("loras: is no LoRA")
            if hostile.name == "sticky":
                weights.append(hostile.name)
            if hostile.name == "strange":
                raise OverflowError

        files = [
            HostileFile("good", b"", is_taken=True),
            HostileFile("sticky", b"", is_taken=True),
            HostileFile("wrong", b"", is_taken=False),
            HostileFile("strange", b"", is_taken=None),
            HostileFile("fine", b"", is_taken=None),
        ]
        in_process.attack_adapters(result, put_on, lambda: weights[-1], files)
        assert result.breaks == [
            "good: refused: loras: is no LoRA",
            "sticky: the weights are not as they were",
            "wrong: taken",
            "strange: OverflowError: ",
        ]

    def test_of_adapters_on_a_worker(self, result: Tally) -> None:
        """A file that should be refused is taken, one that should be taken is refused, and a path
        that should lead nowhere leads to a file."""
        right = {one.name: one for one in hostile_adapters.files()}
        files = [
            replace(right["a good LoRA"], is_taken=False),
            replace(right["a pickle, in loras"], is_taken=True),
        ]
        adapters_on_workers.attack_with_adapter_files(result, files, ["one.safetensors"], [])
        assert [line.partition(":")[0] for line in result.breaks] == [
            "a good LoRA",
            "a pickle, in loras",
            "{'loras'",
        ]

    def test_of_a_token(self) -> None:
        without = HostileServer(connections=[Connection("a", b"GET /a HTTP/1.1")])
        having = HostileServer(connections=[Connection("a", b"Authorization: Bearer token")])
        nobody = HostileServer()
        told = [
            adapters_on_workers.misled(hub, elsewhere, "token")
            for hub, elsewhere in (
                (having, without),
                (without, without),
                (having, nobody),
                (having, having),
            )
        ]
        assert told == [
            None,
            "not sent to its own host",
            "the redirect was not followed",
            "sent on to another host",
        ]

    def test_of_a_message_about_this_machine(self) -> None:
        assert unreadable(f"no file {tally.REPOSITORY}/models") is not None
        assert unreadable("half a character: \ud800") is not None


class TestTheProgram:
    def run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[int, dict[str, Any]]:
        command = ["attack", "--quick", "--kinds", "validation", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", command)
        status = program.main()
        [kind] = json.loads((tmp_path / "attack.json").read_text())["kinds"]
        return status, kind

    def test_it_ends_well_where_all_held(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        status, kind = self.run(monkeypatch, tmp_path)
        assert (status, kind["held"], kind["broke"]) == (0, 2000, 0)
        assert "| fuzzed inputs, validated | 2,000 | 2,000 | 0 |" in capsys.readouterr().out

    def test_it_ends_badly_where_something_broke(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(program, "parse_request", lambda job_input: job_input["prompt"])
        status, kind = self.run(monkeypatch, tmp_path)
        assert status == 1
        assert kind["broke"] == 2000 - kind["held"] > 0

    def test_a_part_of_it_leaves_the_result_of_the_whole(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(program.common, "RESULTS_DIR", tmp_path)
        monkeypatch.setattr(sys, "argv", ["attack", "--quick", "--kinds", "validation"])
        assert program.main() == 0
        assert logging.root.manager.disable == logging.NOTSET, "for whatever comes after"
        assert list(tmp_path.iterdir()) == []


class TestInputs:
    def test_valid_ones_obey_the_schema(self) -> None:
        schema = jsonschema.Draft202012Validator(Request.model_json_schema())
        random_ = random.Random(1)  # noqa: S311  not for secrets
        seen: set[str] = set()
        for _ in range(300):
            job_input = job_inputs.valid(random_)
            schema.validate(job_input)
            parse_request(job_input)
            seen |= set(job_input)
        assert seen == set(Request.model_fields), "each field is tried"

    def test_objects_are_wrong_in_what_is_inside_them_too(self) -> None:
        random_ = random.Random(1)  # noqa: S311  not for secrets
        told: set[str] = set()
        for name in ("controlnet", "ip_adapter", "hires", "upscale", "loras"):
            for _ in range(100):
                value = job_inputs.wrong_inside(random_, job_inputs.schemas()[name])
                try:
                    parse_request({"prompt": "a", name: value})
                except RequestError as error:
                    told |= {line.partition(":")[0] for line in str(error).splitlines()}
        assert told >= {
            *("controlnet[0].type", "controlnet[0].image_url", "controlnet[2].scale"),
            *("controlnet[0].start", "controlnet[0].preprocess", "ip_adapter[0].mask_url"),
            *("hires.scale", "hires.strength", "hires.steps", "hires.upscaler"),
            *("upscale.factor", "upscale.upscaler", "loras[0].path", "input"),
        }

    def test_fuzzed_ones_are_of_every_field_and_mostly_wrong(self) -> None:
        random_ = random.Random(1)  # noqa: S311  not for secrets
        inputs = [job_inputs.fuzzed(random_) for _ in range(500)]
        fields = {name for one in inputs if isinstance(one, dict) for name in one}
        assert fields > set(Request.model_fields)
        refused = 0
        for job_input in inputs:
            try:
                parse_request(job_input)
            except RequestError:
                refused += 1
        assert 250 < refused < 490


class TestHostileServer:
    def test_an_upload_is_read_and_answered(self) -> None:
        with HostileServer() as server:
            request = urllib.request.Request(
                server.address("good"), data=bytes(5_000_000), method="PUT"
            )
            with urllib.request.urlopen(request, timeout=5) as response:
                assert response.status == 200

    def test_a_good_picture_can_be_had(self) -> None:
        with (
            HostileServer() as server,
            urllib.request.urlopen(server.address("good", "token=1"), timeout=5) as response,
        ):
            assert response.read() == PICTURE

    def test_it_sees_that_a_reader_has_gone(self) -> None:
        with HostileServer() as server:
            port = int(server.address("drip").split(":")[2].partition("/")[0])
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET /drip HTTP/1.1\r\nHost: a\r\n\r\n")
                assert server.wait_for("drip", 1, 5)
            assert server.wait_for("drip", 0, 2)

    def test_it_stands_for_the_hub_as_well(self) -> None:
        with (
            HostileServer(behaviours()) as server,
            urllib.request.urlopen(f"{server.origin}/own/a/resolve/main/lora.safetensors") as file,
        ):
            assert b"lora_down.weight" in file.read()
            assert server.connections[0].request.startswith(b"GET /own/a/")

    @pytest.mark.parametrize(
        "name", [*ENDLESS, *endless_behaviours(), *OTHERS, *behaviours(), *GOOD, *TLS]
    )
    def test_every_misbehaviour_sends_bytes_or_waits(self, name: str) -> None:
        endless = {**ENDLESS, **endless_behaviours()}
        behaviour = {**endless, **OTHERS, **behaviours(), **GOOD, **TLS}[name]
        for _ in range(2):  # for each connection anew
            sent = list(itertools.islice(behaviour(), 4))
            assert all(isinstance(what, bytes | float | int) for what in sent)
            assert len(sent) == 4 or name not in endless


def test_bombs_are_small_and_large_inside() -> None:
    for picture in hostile_pictures.bombs():
        assert len(picture.data) < 7_400_000, "/run takes 10 MB, in base64"
