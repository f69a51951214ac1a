"""Attacks on real worker processes: by callers, by picture servers, by the platform itself."""

import random
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from benchmarks.attack.hostile_pictures import HostilePicture, sample
from benchmarks.attack.hostile_server import ENDLESS, GOOD, OTHERS, TLS, HostileServer
from benchmarks.attack.job_inputs import CHEAP, Fields, data_uri, fuzzed, png_bytes, valid
from benchmarks.attack.real_workers import (
    came_true,
    ended,
    real_workers,
    replace,
    wants_to_be_replaced,
    written,
)
from benchmarks.attack.tally import Tally, unreadable_answer
from local_endpoint.faults import JUNK_JOBS, Faults
from local_endpoint.local import ENDED, LocalEndpoint
from local_endpoint.queue import Receipt
from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.decoder_process import MAX_MEMORY_BYTES
from sdxl_worker.inputs.fetch import FETCH_TIMEOUT_SECONDS
from sdxl_worker.outputs.upload import UPLOAD_SECONDS
from sdxl_worker.request import parse_request

PLAIN = {"prompt": "a red circle on a blue background", "seed": 1, **CHEAP}
# Of the refiner, since it begins with a picture. Without a mode, that would keep its size.
ON_PICTURE = {**CHEAP, "mode": "refine", "refiner_inference_steps": 4, "strength": 0.5}
# Inpainting, of a picture that has the shape of most of the odd ones.
UNDER_MASK = {**CHEAP, "image_url": data_uri(png_bytes(sample()))}
JOB_SECONDS = 120.0
PROMPT_SECONDS = 15.0
# After the worker's own deadline: time to say so while other jobs run.
SLACK_SECONDS = 10.0
CLOSED_SECONDS = 3.0
STOP_SECONDS = 8.0
# Of slow servers at once. One that a picture goes to holds no place that jobs wait for.
GROUP = 4
STORAGE_GROUP = 16
# What the decoder may take, and what the worker holds of the request beside it.
PICTURE_MEMORY_MAX_BYTES = MAX_MEMORY_BYTES + 200 * 10**6


def attack_with_jobs(tally: Tally, *, count: int, seed: int) -> None:
    """Jobs, good and bad in turn: each is answered, and no worker asks to be replaced."""
    random_ = random.Random(seed)  # noqa: S311  not for secrets
    with real_workers(2) as endpoint:
        jobs = []
        for number in range(count):
            job_input = refused(random_) if number % 2 else valid(random_)
            jobs.append((endpoint.run(job_input), job_input))
        for job_id, job_input in jobs:
            answer = ended(endpoint, job_id, JOB_SECONDS)
            complaint = unreadable_answer(answer, asked=job_input)
            if job_id in wants_to_be_replaced(endpoint):
                complaint = "asked for the worker to be replaced"
            tally.add(f"{job_input!r:.200}", complaint)


def refused(random_: random.Random) -> Any:
    """An input that JSON can carry, that reaches the worker, and that it has to refuse."""
    while True:
        job_input = fuzzed(random_)
        if job_input in ({}, None) or "nan" in repr(job_input) or "inf" in repr(job_input):
            continue  # the platform leaves out an empty input, and does not read such numbers
        try:
            parse_request(job_input)
        except RequestError:
            return job_input


def attack_with_pictures(
    tally: Tally,
    pictures: Iterable[HostilePicture],
    field: str = "image_url",
    beside: Fields = ON_PICTURE,
) -> None:
    """Pictures in the request: each is drawn on or refused, within a bound on the memory."""
    with real_workers() as endpoint:
        for hostile in pictures:
            [worker] = endpoint.workers
            before = memory_bytes(worker.pid)
            job_input = {**beside, field: data_uri(hostile.data)}
            job_id = endpoint.run(job_input)
            grown = peak_bytes_until_ended(endpoint, job_id, worker.pid) - before
            must_be = {None: (), True: ("COMPLETED",), False: ("FAILED",)}[hostile.is_taken]
            complaint = unreadable_answer(endpoint.status(job_id), *must_be, asked=job_input)
            tally.raise_to("most_memory_mb", grown / 1e6)
            if grown > PICTURE_MEMORY_MAX_BYTES:
                complaint = f"took {grown / 1e6:.0f} MB of memory"
            if worker.exit_status is not None:
                complaint = f"the worker ended with {worker.exit_status}"
            tally.add(hostile.name, complaint)
            if endpoint.status(job_id)["status"] == "IN_PROGRESS":
                replace(endpoint, worker)


def peak_bytes_until_ended(endpoint: LocalEndpoint, job_id: str, pid: int) -> int:
    """The most memory seen while the job ran."""
    seen: list[int] = []

    def has_ended() -> bool:
        seen.append(memory_bytes(pid))
        return endpoint.status(job_id)["status"] in ENDED

    came_true(has_ended, JOB_SECONDS)
    return max(seen)


def memory_bytes(pid: int) -> int:
    """Of the process and its children; 0 where it has ended."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family)
    except psutil.NoSuchProcess:
        return 0


def attack_with_a_picture_server(
    tally: Tally, names: Sequence[str] = (*GOOD, *OTHERS, *ENDLESS, *TLS)
) -> None:
    """Each misbehaviour is answered in time, can be cancelled, and stops neither other jobs nor
    the end of the worker; what is secret in an address is told nowhere."""
    secret = f"CANARY-{secrets.token_hex(8)}"
    environment = {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true", "WORKER_CONCURRENCY": "8"}
    with (
        HostileServer() as server,
        real_workers(stop_grace_seconds=STOP_SECONDS + 2, environment=environment) as endpoint,
    ):

        def asked(name: str) -> Fields:
            return {**ON_PICTURE, "image_url": with_secrets(server, name, secret)}

        def send(name: str) -> str:
            return endpoint.run(asked(name))

        def complaint(name: str, answer: dict[str, Any]) -> str | None:
            allowed = ("COMPLETED",) if name in GOOD else ()
            return unreadable_answer(answer, *allowed, asked=asked(name))

        for at in range(0, len(names), GROUP):
            some = names[at : at + GROUP]
            answers_in_time(tally, endpoint, send, some, FETCH_TIMEOUT_SECONDS, complaint, secret)
        tally.add("a plain job afterwards", plain_job(endpoint))
        for name in [name for name in names if name in {**ENDLESS, **TLS}]:
            tally.add(f"{name}, cancelled", cancelled(endpoint, server, send, name))
        tally.add("a plain job after the cancelled ones", plain_job(endpoint))
        job_ids = [send("drip") for _ in range(3)]
        tally.add("the end of the worker amid drips", end_amid(endpoint, server, "drip", job_ids))
        tally.add("the secrets of addresses, in all that was posted and logged",
                  secret_told(endpoint, secret))  # fmt: skip


def attack_with_storage(
    tally: Tally, names: Sequence[str] = (*GOOD, *OTHERS, *ENDLESS, *TLS)
) -> None:
    """Whatever presigned addresses do, each picture is a link or comes with a warning, in time."""
    secret = f"CANARY-{secrets.token_hex(8)}"
    environment = {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true", "WORKER_CONCURRENCY": "8"}
    with (
        HostileServer() as server,
        real_workers(stop_grace_seconds=STOP_SECONDS + 2, environment=environment) as endpoint,
    ):

        def asked(name: str) -> Fields:
            return {**PLAIN, "upload_urls": [with_secrets(server, name, secret)]}

        def send(name: str) -> str:
            return endpoint.run(asked(name))

        def complaint(name: str, answer: dict[str, Any]) -> str | None:
            told = unreadable_answer(answer, "COMPLETED", asked=asked(name))
            if told is None and name in GOOD:
                return answer["output"].get("warning")
            return told

        for at in range(0, len(names), STORAGE_GROUP):
            some = names[at : at + STORAGE_GROUP]
            answers_in_time(tally, endpoint, send, some, UPLOAD_SECONDS, complaint, secret)
        tries = sum(one.path == "redirect-loop" for one in server.connections)
        followed = f"{tries} requests, of which one is the upload" if tries > 1 else None
        tally.add("a redirect is not followed", followed)
        for name in [name for name in names if name in {**ENDLESS, **TLS}]:
            tally.add(f"{name}, cancelled", cancelled(endpoint, server, send, name))
        job_ids = [send("silence") for _ in range(3)]
        end = end_amid(endpoint, server, "silence", job_ids)
        for job_id in job_ids:
            answer = ended(endpoint, job_id, PROMPT_SECONDS)
            end = end or complaint("silence", answer)
            if end is None and answer.get("retries"):
                end = "what was drawn was not sent, and is drawn again"
        tally.add("the end of the worker amid uploads", end)
        tally.add("the secrets of addresses, in all that was posted and logged",
                  secret_told(endpoint, secret))  # fmt: skip


def with_secrets(server: HostileServer, name: str, secret: str) -> str:
    return server.address(name, f"token={secret}").replace("://", f"://user:{secret}@")


def secret_told(endpoint: LocalEndpoint, secret: str) -> str | None:
    told = [line for line in written(endpoint).splitlines() if secret in line]
    return f"told {len(told)} times, first in {told[0]:.200}" if told else None


def answers_in_time(
    tally: Tally,
    endpoint: LocalEndpoint,
    send: Callable[[str], str],
    names: Sequence[str],
    seconds: float,
    complain: Callable[[str, dict[str, Any]], str | None],
    secret: str,
) -> None:
    deadline = time.monotonic() + seconds + SLACK_SECONDS
    job_ids = {name: send(name) for name in names}
    answers = {
        name: ended(endpoint, job_id, max(0, deadline - time.monotonic()))
        for name, job_id in job_ids.items()
    }
    for name, answer in answers.items():
        complaint = complain(name, answer)
        if secret in f"{answer.get('output')} {answer.get('error')}":
            complaint = "the answer tells the secret of the address"
        tally.add(name, complaint)
    if any(answer["status"].startswith("no answer") for answer in answers.values()):
        replace(endpoint, endpoint.workers[0])


def cancelled(
    endpoint: LocalEndpoint, server: HostileServer, send: Callable[[str], str], name: str
) -> str | None:
    job_id = send(name)
    # What is refused at once, as too long a line, has ended before it can be cancelled.
    if not server.wait_for(name, 1, 5):
        return unreadable_answer(ended(endpoint, job_id, PROMPT_SECONDS))
    endpoint.call(f"cancel/{job_id}", {})
    if not server.wait_for(name, 0, CLOSED_SECONDS):
        replace(endpoint, endpoint.workers[0])
        return f"the connection is still open {CLOSED_SECONDS:.0f} s after the cancel"
    return None


def plain_job(endpoint: LocalEndpoint) -> str | None:
    return unreadable_answer(ended(endpoint, endpoint.run(PLAIN), PROMPT_SECONDS), "COMPLETED")


def end_amid(
    endpoint: LocalEndpoint, server: HostileServer, name: str, job_ids: Sequence[str]
) -> str | None:
    """The end of the worker while these jobs wait for the server."""
    [worker] = endpoint.workers
    if not server.wait_for(name, len(job_ids), 10):
        return f"{server.open_count(name)} of {len(job_ids)} connections were open at once"
    worker.terminate()
    if not came_true(lambda: worker.exit_status is not None, STOP_SECONDS):
        return f"still runs {STOP_SECONDS:.0f} s after SIGTERM"
    return None


@dataclass(frozen=True)
class Trouble:
    """Something that goes wrong at the platform, for the next jobs."""

    name: str
    begin: Callable[[Faults], None]
    may_be_redelivered: bool = False
    """Whether the worker cannot help it that the platform has to deliver a job again."""


def _answered(route: str, code: int, times: int = 1) -> Trouble:
    often = f", {times} times" if times > 1 else ""
    return Trouble(f"{route} answers {code}{often}", lambda f: f.answer(route, code, times=times))


# A new kind of fault joins by a line here.
TROUBLES = (
    *(_answered("job-done", code) for code in (400, 408, 429, 500, 502, 503)),
    _answered("job-done", 500, 3),
    _answered("job-done", 429, 3),
    Trouble("job-done drops the connection", lambda f: f.drop("job-done")),
    Trouble("job-done drops the connection, 3 times", lambda f: f.drop("job-done", times=3)),
    Trouble("job-done drops the answer", lambda f: f.drop_answer("job-done")),
    Trouble("job-done takes 4 s", lambda f: f.delay("job-done", 4)),
    *(_answered("job-take", code, 3) for code in (400, 401, 429, 500)),
    Trouble("job-take drops the connection", lambda f: f.drop("job-take", times=3)),
    Trouble("job-take drops the answer", lambda f: f.drop_answer("job-take"), True),
    Trouble("jobs are handed out twice", lambda f: f.duplicate(times=2)),
    *(_answered("progress", code, 3) for code in (400, 500)),
    Trouble("progress drops the connection", lambda f: f.drop("progress", times=3)),
    Trouble("progress takes 4 s", lambda f: f.delay("progress", 4)),
    _answered("job-stop", 500, 3),
    Trouble("job-stop drops the connection", lambda f: f.drop("job-stop", times=3)),
    _answered("ping", 500, 5),
    Trouble("ping drops the connection", lambda f: f.drop("ping", times=3)),
    *(
        Trouble(f"job-take hands out {what}", partial(Faults.add, route="job-take", fault=fault))
        for what, fault in JUNK_JOBS.items()
    ),
)
JOBS_IN_TROUBLE = (PLAIN, {**PLAIN, "num_inference_steps": 60, "preview": True}, {"prompt": 3})


def attack_as_the_platform(tally: Tally, troubles: Sequence[Trouble] = TROUBLES) -> None:
    """Each job has exactly one result, whatever the platform answers."""
    with real_workers(2) as endpoint:
        for trouble in troubles:
            trouble.begin(endpoint.faults)
            job_ids = [endpoint.run(job_input) for job_input in JOBS_IN_TROUBLE]
            complaints = [
                complaint
                for job_id in job_ids
                if (complaint := _not_once(endpoint, job_id, trouble.may_be_redelivered))
            ]
            endpoint.faults.clear()
            tally.add(trouble.name, "; ".join(complaints) or None)


def _not_once(endpoint: LocalEndpoint, job_id: str, may_be_redelivered: bool) -> str | None:
    answer = ended(endpoint, job_id, 60)
    accepted = sum(
        post.receipt is Receipt.ACCEPTED for post in endpoint.record.posts_of(job_id, "result")
    )
    if accepted != 1:
        return f"{accepted} results were accepted ({answer['status']})"
    if answer.get("retries") and not may_be_redelivered:
        return "the first result was lost, and the platform had to deliver the job again"
    return unreadable_answer(answer)
