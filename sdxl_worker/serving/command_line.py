"""`python handler.py` on a developer's machine: the forms of `--test_input`, and pictures as files.

The SDK takes `--test_input` as a JSON string only and prints results to the log. Here it may also
be a path or have no value, and the pictures of a local job are saved.
"""

import argparse
import base64
import json
import os
import sys
import tempfile
import time
from enum import Enum
from pathlib import Path
from typing import Any

from sdxl_worker.field_types import MAX_SEED
from sdxl_worker.serving.job import Handler
from sdxl_worker.serving.job_bar import job_shown
from sdxl_worker.settings import TRUE_WORDS

DEFAULT_JOB_FILE = "test_input.json"
OUTPUT_DIR = Path("output")


class Place(Enum):
    """Where jobs come from."""

    LOCAL_JOB = "the command line or a file: one job"
    SERVER = "the SDK's test server"
    HTTP = "the worker's own server: of a load-balancing endpoint, or anywhere"
    QUEUE = "the platform"


def prepare(arguments: list[str]) -> tuple[list[str], Place]:
    """Turn the command line into one that the SDK takes.

    The first of these that is there says where jobs come from: `--rp_serve_api` or
    `RUNPOD_REALTIME_PORT`; `--test_input`; `--serve` or `SERVE_HTTP`, HTTP;
    `RUNPOD_WEBHOOK_GET_JOB`, the queue; `PORT`, HTTP. Where none is, it is test_input.json.
    `--port N` is `PORT`.

    Returns:
        The arguments for the SDK, and where jobs come from.

    Exits with a message where `--test_input` is neither JSON nor a file with JSON in it, or where
    something unknown is beside `--serve`; and after printing the help for `--help`.
    """
    if {"-h", "--help"} & set(arguments):
        from runpod.serverless import parser

        parser.print_help()
        print("\nHere --test_input takes JSON, the path of a file, or nothing: test_input.json.")
        print("--serve [--port N] serves HTTP, with the settings of docs/server.md.")
        sys.exit(0)
    # An empty variable counts as unset, but the SDK would try to read a number from this one.
    if not os.environ.get("RUNPOD_REALTIME_PORT"):
        os.environ.pop("RUNPOD_REALTIME_PORT", None)
    # transformers warns at import that torchvision is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    arguments, job = _job_of(arguments)
    parser = argparse.ArgumentParser(prog="handler.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--port")
    own, arguments = parser.parse_known_args(arguments)
    if own.port is not None:
        os.environ["PORT"] = own.port
    if "--rp_serve_api" in arguments or "RUNPOD_REALTIME_PORT" in os.environ:
        return arguments, Place.SERVER
    if job is None and (own.serve or os.environ.get("SERVE_HTTP", "").lower() in TRUE_WORDS):
        if own.serve and arguments:
            sys.exit(f"{arguments[0]}: no such argument; --serve goes with --port N alone")
        # Nothing is taken from a queue, nor told to it.
        os.environ.pop("RUNPOD_WEBHOOK_GET_JOB", None)
        return arguments, Place.HTTP
    if job is None and os.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        return arguments, Place.QUEUE
    if job is None and os.environ.get("PORT"):
        return arguments, Place.HTTP
    return [*arguments, f"--test_input={job or _read(DEFAULT_JOB_FILE)}"], Place.LOCAL_JOB


def saving(handler: Handler) -> Handler:
    """The handler for a local job: it saves the pictures and answers with their paths.

    Where they cannot be saved, it answers with an error, at which the SDK exits with 1.
    """

    async def handle_and_save(job: dict[str, Any]) -> dict[str, Any]:
        with job_shown():
            output = await handler(job)
        try:
            paths, maps = _save(output)
        except OSError as error:
            if "error" in output:
                return output
            return {
                "error": f"the pictures cannot be saved in {OUTPUT_DIR.resolve()}: "
                f"{error.strerror}; see that it is a folder which can be written to and has room, "
                "or run the worker in another folder"
            }
        if "images" not in output:
            return output
        for path in (*paths, *maps):
            print(f"Saved {path}")
        first = {"image_url": paths[0]} if "image_url" in output else {}
        return {**output, "images": paths, **first, **({"maps": maps} if maps else {})}

    return handle_and_save


def _save(output: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Write the answer and its pictures, if there are any: all of it or nothing.

    Returns:
        The paths of the pictures and of the control maps. What was uploaded stays a link.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    pictures: dict[str, bytes] = {}

    def place_of(image: str, stem: str) -> str:
        header, _, payload = image.partition(",")
        if not header.startswith("data:image/"):
            return image
        name = f"{stem}.{header.removeprefix('data:image/').removesuffix(';base64')}"
        pictures[name] = base64.b64decode(payload)
        return str(OUTPUT_DIR / name)

    stems = [
        f"{stamp}-seed{(output['seed'] + i) % (MAX_SEED + 1)}"
        for i in range(len(output.get("images", ())))
    ]
    places = [
        place_of(one, stem) for one, stem in zip(output.get("images", ()), stems, strict=True)
    ]
    maps = [place_of(one, f"{stems[0]}.map-{i}") for i, one in enumerate(output.get("maps", ()), 1)]
    # The whole answer, as the platform's status route gives it.
    answer = json.dumps(output if "error" in output else {"output": output}).encode()
    files = {**pictures, "output.json": answer}
    OUTPUT_DIR.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT_DIR) as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        for name in files:
            Path(folder, name).replace(OUTPUT_DIR / name)
    return places, maps


def _job_of(arguments: list[str]) -> tuple[list[str], str | None]:
    """Take `--test_input` and its value, if it has one, out of the arguments.

    Returns:
        The other arguments, and the job as JSON text, or None without `--test_input`.
    """
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--test_input":
            continue
        rest = arguments[i + 1 :]
        if not equals and rest and not rest[0].startswith("--"):
            value, *rest = rest
        return arguments[:i] + rest, _read(value or DEFAULT_JOB_FILE)
    return arguments, None


def _read(value: str) -> str:
    """JSON text from `value`, which is JSON itself or the path of a file that holds it."""
    is_json = value.lstrip().startswith(("{", "["))
    try:
        text = value if is_json else Path(value).read_text(encoding="utf-8")
        job = json.loads(text)
    except OSError as error:
        sys.exit(f"--test_input: {value} cannot be read: {error.strerror}")
    except ValueError as error:
        sys.exit(f"--test_input: {'the value' if is_json else value} is not valid JSON: {error}")
    if not isinstance(job, dict) or "input" not in job:
        sys.exit('--test_input: a job must be an object with "input" in it: {"input": {...}}')
    return json.dumps(job)
