"""Attacks on real worker processes with LoRAs, embeddings and names of models."""

import json
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.attack.hostile_adapters import (
    GOOD_LORA,
    MODELS,
    OUTSIDE,
    PATHS,
    HostileFile,
    behaviours,
    endless_behaviours,
    lay_out,
)
from benchmarks.attack.hostile_server import (
    ENDLESS,
    OTHERS,
    TLS,
    HostileServer,
    redirect,
)
from benchmarks.attack.job_inputs import CHEAP, Fields
from benchmarks.attack.on_workers import (
    JOB_SECONDS,
    PLAIN,
    STOP_SECONDS,
    answers_in_time,
    cancelled,
    end_amid,
    memory_bytes,
    peak_bytes_until_ended,
    plain_job,
    secret_told,
    with_secrets,
)
from benchmarks.attack.real_workers import ended, real_workers, replace, wants_to_be_replaced
from benchmarks.attack.tally import Tally, unreadable_answer
from benchmarks.own_samples import write_loras, write_models
from local_endpoint.local import LocalEndpoint
from sdxl_worker.inputs.adapter_sources import SUFFIX

# A file's own settings are to have their effect.
WITHOUT_STEPS = {name: value for name, value in CHEAP.items() if name != "num_inference_steps"}
# Of so many at once: their headers, and what they are multiplied to.
FILES_MEMORY_MAX_BYTES = 800 * 10**6
# In place of 600 and 30, for a file of hundreds of MB may take its time.
DOWNLOAD_SECONDS = 8.0
STALL_SECONDS = 3.0
WORKER = (
    "from sdxl_worker.inputs import adapter_download, adapter_hosts; "
    f"adapter_download.DOWNLOAD_SECONDS = {DOWNLOAD_SECONDS}; "
    f"adapter_hosts.STALL_SECONDS = {STALL_SECONDS}; "
    "import handler; handler.main()"
)
CONCURRENCY = 8
REPOSITORY = "own/hostile"
SERVED = {**OTHERS, **behaviours()}
UNENDING = {**ENDLESS, **endless_behaviours()}
SLOW = "lora-in-drips"
TAKEN = (GOOD_LORA, "elsewhere")


def attack_with_adapter_files(
    tally: Tally,
    files: Sequence[HostileFile],
    paths: Sequence[str] = PATHS,
    models: Sequence[str] = MODELS,
) -> None:
    """Files in LORA_DIR, and names of files and models that lead elsewhere: each is drawn with or
    refused, within a bound on the memory, and nothing of it stays. Nothing tells of folders."""
    with _folders() as folder, HostileServer(behaviours()) as elsewhere:
        good = elsewhere.address(GOOD_LORA)
        redirects = {
            "to loopback": redirect(good),
            "to loopback, over TLS": redirect(good.replace("http", "https")),
            "to the cloud's metadata": redirect("https://169.254.169.254/latest/meta-data"),
        }
        with (
            HostileServer(redirects) as hub,
            real_workers(
                environment={**_environment(folder), "HF_ENDPOINT": hub.origin}
            ) as endpoint,
        ):
            before = _plain_answer(endpoint)
            for at in range(0, len(files), CONCURRENCY):
                _try_files(tally, endpoint, files[at : at + CONCURRENCY], folder)
            tally.add("a plain job after the files", _compared(endpoint, before))
            led = [*paths, *map(_at_hub, redirects)]
            asked: list[Fields] = [{"loras": [{"path": path}]} for path in led]
            _try_refused(tally, endpoint, [*asked, *({"model": name} for name in models)], folder)
            followed = {one.path for one in hub.connections} >= redirects.keys()
            opened = bool(elsewhere.connections)
            told = "a connection was opened" if opened else "the Hub was not asked"
            tally.add("redirects", told if opened or not followed else None)
            tally.add("a plain job after all", _compared(endpoint, before))


def attack_with_an_adapter_server(
    tally: Tally, names: Sequence[str] = (*SERVED, *UNENDING, *TLS)
) -> None:
    """What the Hub's mirror does wrong is answered in time and can be cancelled, and stops neither
    other jobs nor the end of the worker. Tokens go to their own host alone."""
    secret, token = (f"CANARY-{secrets.token_hex(8)}" for _ in range(2))
    with _folders() as folder, HostileServer(behaviours()) as elsewhere:
        carried = redirect(elsewhere.address(GOOD_LORA, f"signature={secret}"))
        environment = {
            **_environment(folder),
            "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
            "HF_TOKEN": token,
            "CIVITAI_TOKEN": token,
        }
        with (
            HostileServer({**SERVED, **UNENDING, "elsewhere": carried}) as hub,
            real_workers(
                stop_grace_seconds=STOP_SECONDS + 2,
                environment={**environment, "HF_ENDPOINT": hub.origin},
                command=(sys.executable, "-c", WORKER),
            ) as endpoint,
        ):

            def asked(name: str) -> Fields:
                path = _at_hub(name) if name not in TLS else with_secrets(hub, name, secret)
                return {**PLAIN, "loras": [{"path": path}]}

            def send(name: str) -> str:
                return endpoint.run(asked(name))

            def complaint(name: str, answer: dict[str, Any]) -> str | None:
                must_be = "COMPLETED" if name in TAKEN else "FAILED"
                told = unreadable_answer(answer, must_be, asked=asked(name))
                return told or _folder_told(answer, folder)

            def try_(some: Sequence[str]) -> None:
                answers_in_time(tally, endpoint, send, some, DOWNLOAD_SECONDS, complaint, secret)

            before = _plain_answer(endpoint)
            for at in range(0, len(names), CONCURRENCY):
                try_(names[at : at + CONCURRENCY])
            tally.add("a plain job afterwards", _compared(endpoint, before))
            for name in [name for name in names if name in {**UNENDING, **TLS}]:
                tally.add(f"{name}, cancelled", cancelled(endpoint, hub, send, name))
            tally.add("a plain job after the cancelled ones", _compared(endpoint, before))
            try_(["elsewhere"])
            tally.add("a token, at its host and elsewhere", misled(hub, elsewhere, token))
            amid = end_amid(endpoint, hub, SLOW, [send(SLOW)])
            tally.add("the end of the worker amid a download", amid)
            told = secret_told(endpoint, secret) or secret_told(endpoint, token)
            tally.add("secrets, in all that was posted and logged", told)


def _at_hub(name: str) -> str:
    return f"{REPOSITORY}/{name}{SUFFIX}"


@contextmanager
def _folders() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_loras(folder / "loras")
        write_models(folder / "models")
        lay_out(folder / "loras", folder / "models", folder / OUTSIDE)
        yield folder


def _environment(folder: Path) -> dict[str, str]:
    return {
        "LORA_DIR": str(folder / "loras"),
        "MODELS_DIR": str(folder / "models"),
        "LORA_CACHE_DIR": str(folder / "cache"),
        "LORA_CACHE_GB": "0.1",
        "WORKER_CONCURRENCY": str(CONCURRENCY),
    }


def _try_files(
    tally: Tally, endpoint: LocalEndpoint, files: Sequence[HostileFile], folder: Path
) -> None:
    """At once. Each is answered; the memory is that of all of them."""
    [worker] = endpoint.workers
    before = memory_bytes(worker.pid)
    asked: dict[str, Fields] = {}
    for number, hostile in enumerate(files):
        path = folder / "loras" / f"hostile-{number}{SUFFIX}"
        path.unlink(missing_ok=True)
        hostile.write(path)
        job_input = {**WITHOUT_STEPS, "seed": 1, **hostile.asked(path.name)}
        asked[endpoint.run(job_input)] = job_input
    grown = max(peak_bytes_until_ended(endpoint, job_id, worker.pid) for job_id in asked) - before
    tally.raise_to("most_memory_mb", grown / 1e6)
    for hostile, (job_id, job_input) in zip(files, asked.items(), strict=True):
        answer = endpoint.status(job_id)
        must_be = {None: (), True: ("COMPLETED",), False: ("FAILED",)}[hostile.is_taken]
        complaint = unreadable_answer(answer, *must_be, asked=job_input)
        if grown > FILES_MEMORY_MAX_BYTES:
            complaint = f"took {grown / 1e6:.0f} MB of memory, with those beside it"
        if job_id in wants_to_be_replaced(endpoint):
            complaint = "asked for the worker to be replaced"
        if worker.exit_status is not None:
            complaint = f"the worker ended with {worker.exit_status}"
        tally.add(hostile.name, complaint or _folder_told(answer, folder))
    if any(endpoint.status(job_id)["status"] == "IN_PROGRESS" for job_id in asked):
        replace(endpoint, worker)


def _try_refused(
    tally: Tally, endpoint: LocalEndpoint, asked: Sequence[Fields], folder: Path
) -> None:
    job_ids = [endpoint.run({**PLAIN, **fields}) for fields in asked]
    for fields, job_id in zip(asked, job_ids, strict=True):
        answer = ended(endpoint, job_id, JOB_SECONDS)
        complaint = unreadable_answer(answer, "FAILED") or _folder_told(answer, folder)
        tally.add(f"{fields!r:.100}", complaint)


def _folder_told(answer: dict[str, Any], folder: Path) -> str | None:
    told = json.dumps({**answer, "output": None})
    return "the answer tells a folder of the worker" if str(folder) in told else None


def _plain_answer(endpoint: LocalEndpoint) -> object:
    return ended(endpoint, endpoint.run(PLAIN), JOB_SECONDS).get("output")


def _compared(endpoint: LocalEndpoint, before: object) -> str | None:
    complaint = plain_job(endpoint)
    if complaint is None and _plain_answer(endpoint) != before:
        return "another picture than before"
    return complaint


def misled(hub: HostileServer, elsewhere: HostileServer, token: str) -> str | None:
    """Whether a token went where it should not, or did not go where it should."""
    if not any(token.encode() in one.request for one in hub.connections):
        return "not sent to its own host"
    seen = [one.request for one in elsewhere.connections]
    if not seen:
        return "the redirect was not followed"
    return "sent on to another host" if any(token.encode() in one for one in seen) else None
