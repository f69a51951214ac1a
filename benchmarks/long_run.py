"""Thousands of jobs of every kind through three real workers, and whether anything is left behind.

LoRAs, embeddings and models of a job's own are among them, and between them the same requests
again, whose answers have to be the same bit for bit.

The platform answers badly one time in ten, workers are killed now and then, jobs are cancelled. One
worker is never killed: its memory, file handles, threads and children are noted on the way. The
exit status is 1 where a target was missed.

    python -m benchmarks.long_run
    python -m benchmarks.long_run --jobs 200 --kills 2
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks import common
from benchmarks.attack.hostile_server import Behaviour, HostileServer, once, with_length
from benchmarks.attack.job_inputs import CHEAP, Fields, mask_uri, picture_uri, valid
from benchmarks.attack.on_workers import refused
from benchmarks.attack.real_workers import came_true, ended, real_workers
from benchmarks.attack.tally import unreadable_answer
from benchmarks.own_samples import (
    OTHER_MODEL,
    WORD,
    file_bytes,
    lora,
    write_loras,
    write_models,
)
from local_endpoint.faults import PASSING, Fault
from local_endpoint.local import LocalEndpoint
from local_endpoint.queue import Receipt
from local_endpoint.workers import Worker
from sdxl_worker.field_types import SIDE_MULTIPLE_PX
from sdxl_worker.inputs.adapter_sources import SUFFIX
from sdxl_worker.samplers import SAMPLERS

CHART = common.RESULTS_DIR.parents[1] / "docs" / "long_run.svg"
PLAIN: Fields = {"prompt": "a red circle on a blue background", **CHEAP}
REFINER: Fields = {"refiner_inference_steps": 4, "strength": 0.5}  # What certainly succeeds.
# At the beginning and at the end.
FIRST: Fields = {**PLAIN, "seed": 1, **REFINER}
HUB_LORA = "lora-"
REDRAWN: Fields = {"mode": "img2img", "image_url": picture_uri(), "num_inference_steps": 4}
INPAINTED: Fields = {**REDRAWN, "mask_url": mask_uri()}
SHAPES: dict[str, Fields] = {
    "base alone": {},
    "base and refiner": REFINER,
    "ensemble": {"num_inference_steps": 4, "high_noise_frac": 0.5},
    "picture in the request": {**REFINER, "image_url": picture_uri()},
    "picture at an address": REFINER,
    "preview": {"num_inference_steps": 30, "preview": True},
    "several pictures": {"num_images": 3},
    "redrawn": REDRAWN,
    "inpainted": INPAINTED,
    "inpainted and refined": {
        **INPAINTED,
        "refiner_inference_steps": 4,
        "refiner_strength": 0.5,
        "mask_blur": 4,
    },
    "only the mask": {**INPAINTED, "mask_padding": 8},
    "JPEG": {"output_format": "jpeg"},
    "WebP": {"output_format": "webp", "output_quality": 100, "duplicate_first": False},
    "uploaded": {"num_images": 2},
    "LoRA": {"loras": [{"path": "one.safetensors"}]},
    "LoRAs and an embedding": {
        "prompt": f"a (red:1.3) circle, {WORD}",
        "prompt_weighting": True,
        "loras": [{"path": "one.safetensors"}, {"path": "two.safetensors", "scale": -0.5}],
        "embeddings": [{"path": "word.safetensors", "token": WORD}],
    },
    "LoRA of the Hub": {},
    "few-step LoRA": {"loras": [{"path": "fast.safetensors"}], "num_inference_steps": 4},
    "another model": {"model": OTHER_MODEL},
    "another model, LoRA": {"model": OTHER_MODEL, "loras": [{"path": "two.safetensors"}]},
    "any sampler": {"num_inference_steps": 4},
    "the first again": REFINER,
}
# Asked with the same seed each time, between jobs that change weights and models: the answer is the
# same each time.
REPEATED = (
    "LoRA",
    "LoRAs and an embedding",
    "LoRA of the Hub",
    "few-step LoRA",
    "another model",
    "another model, LoRA",
    "the first again",
)
KINDS = (*SHAPES, "any size", "any fields", "check", "refused", "cancelled")
SAMPLERS_AND_SCHEDULES = [
    (name, schedule) for name, sampler in SAMPLERS.items() for schedule in sampler.schedules
]
HUB_LORAS = 4
# Less than these files take.
LORA_CACHE_BYTES = 2.5 * len(file_bytes(lora(0)))
# Takes many seconds, unless it is cancelled.
LONG: Fields = {**PLAIN, "num_inference_steps": 150, "num_images": 8, "height": 128, "width": 128}
CANCELLED_WITHIN_SECONDS = 3.0
FAULT_SHARE = 0.1
FAULTS = (*PASSING, Fault("duplicate"))
FAULTY_ROUTES = ("job-take", "job-take-batch", "job-done", "progress", "job-stop", "ping")
# A job may meet a fault and a kill, one after the other.
MAX_RETRIES = 3
WAITING_FOR_EACH_WORKER = 3
STUCK_SECONDS = 180.0
SAMPLE_EVERY = 10
# For each size of a picture that is new to it, torch's library for CPUs keeps code that it
# compiled: of 300 sizes the first 60 took 50 MB, the others nothing. Without it, as on a GPU, what
# grows is the worker's own.
WORKER = "import torch; torch.backends.mkldnn.enabled = False; import handler; handler.main()"
# What a worker holds is compared from here on, when it has seen jobs of all kinds: the first with
# KLMS and with a schedule of "beta" load 57 MB of scipy, the first of another model takes 22 MB.
SETTLED_AFTER = 600
GROWTH_MAX = 0.05
# How many more of each may be held at the end. asyncio's pool of threads grows when it has to, and
# the loop that fetches, with three handles of its own, begins with the first address.
MORE_MAX = {"handles": 3, "threads": min(32, (os.cpu_count() or 1) + 4), "children": 0}
# A folder that torch makes at import, the same for each worker.
CACHE = "torchinductor_"


@dataclass(frozen=True)
class Sample:
    """What the worker that is never killed held, after so many jobs of all workers."""

    jobs: int
    memory_mb: float
    handles: int
    threads: int
    children: int


def settling(samples: list[Sample]) -> list[Sample]:
    """Those up to job SETTLED_AFTER, or to the middle of a shorter run."""
    return [one for one in samples if one.jobs <= min(SETTLED_AFTER, samples[-1].jobs // 2)]


@dataclass
class Result:
    jobs: int
    kinds: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Answers that are not as they have to be for the kind of job."""
    killed: int = 0
    faults: int = 0
    delivered_again: int = 0
    repeats_exactly: bool = False
    repeated: int = 0
    """Jobs of the same request as one before."""
    changed: list[str] = field(default_factory=list)
    """Those of them that were answered otherwise than the first."""
    downloads: int = 0
    """Of LoRAs, which the cache does not hold all at once."""
    left_behind: list[str] = field(default_factory=list)
    seconds: float = 0
    samples: list[Sample] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Of memory, from when all kinds of jobs had been seen to the end."""
        early = [one.memory_mb for one in settling(self.samples)][-3:]
        late = [one.memory_mb for one in self.samples][-3:]
        return statistics.median(late) / statistics.median(early) - 1

    @property
    def missed(self) -> list[str]:
        """The targets that were missed, in words."""
        told = {
            f"lost: {self.lost[:5]}": self.lost,
            f"doubled: {self.doubled[:5]}": self.doubled,
            f"wrong: {self.wrong[:5]}": self.wrong,
            f"left behind: {self.left_behind}": self.left_behind,
            f"answered otherwise than before: {self.changed[:5]}": self.changed,
            "the first request was answered otherwise at the end": not self.repeats_exactly,
            f"memory grew by {self.growth:.1%}": self.growth > GROWTH_MAX,
        }
        return [words for words, is_so in told.items() if is_so]


@dataclass(frozen=True)
class Sent:
    kind: str
    job_input: Any
    at: float
    cancel_at: float | None = None


class LongRun:
    """One run on an endpoint whose first worker is the one that is never killed."""

    def __init__(self, endpoint: LocalEndpoint, server: HostileServer, seed: int) -> None:
        self._endpoint = endpoint
        self._server = server
        self._random = random.Random(seed)  # noqa: S311  not for secrets
        self._survivor = endpoint.workers[0]
        self._process = psutil.Process(self._survivor.pid)
        self._waiting: dict[str, Sent] = {}
        self._answers: dict[str, object] = {}

    def drive(self, jobs: int, kills: int, tick: Callable[[], object]) -> Result:
        result = Result(jobs)
        started = time.monotonic()
        first = self._answers[json.dumps(FIRST)] = self._first_picture()
        self._endpoint.faults.at_random(
            *FAULTY_ROUTES, faults=FAULTS, share=FAULT_SHARE, seed=self._random.randrange(2**32)
        )
        kinds = [KINDS[number % len(KINDS)] for number in range(jobs)]
        self._random.shuffle(kinds)
        result.kinds = dict(Counter(kinds))
        kill_at = sorted(self._random.sample(range(jobs // 10, jobs - jobs // 10), kills))
        statuses: Counter[str] = Counter()
        done = 0
        most = WAITING_FOR_EACH_WORKER * len(self._endpoint.workers)
        while done < jobs:
            while kinds and len(self._waiting) < most:
                self._send(kinds.pop())
            self._cancel_due()
            for job_id, answer in self._finished().items():
                sent = self._waiting.pop(job_id)
                statuses[answer["status"]] += 1
                self._judge(result, f"{sent.kind}, {job_id}", sent, job_id, answer)
                done += 1
                tick()
                if done % SAMPLE_EVERY == 0:
                    result.samples.append(self._sample(done))
            if kill_at and done >= kill_at[0] and self._kill_one():
                result.killed += 1
                kill_at.pop(0)
            time.sleep(0.05)
        self._endpoint.faults.clear()
        result.downloads = sum(one.path.startswith(HUB_LORA) for one in self._server.connections)
        result.faults = sum(one.fault is not None for one in self._endpoint.record.exchanges)
        result.statuses = dict(statuses)
        result.repeats_exactly = self._first_picture() == first
        result.left_behind = self._left_in_the_worker(result.samples)
        result.seconds = round(time.monotonic() - started)
        return result

    def _first_picture(self) -> object:
        job_id = self._endpoint.run(FIRST)
        return ended(self._endpoint, job_id, STUCK_SECONDS).get("output")

    def _send(self, kind: str) -> None:
        seed = FIRST["seed"] if kind in REPEATED else self._random.randrange(2**32)
        job_input: Any = {**PLAIN, "seed": seed, **SHAPES.get(kind, {})}
        now = time.monotonic()
        cancel_at = None
        if kind == "check":
            job_input = {"check": True}
        elif kind == "refused":
            job_input = refused(self._random)
        elif kind == "any size":
            job_input["height"], job_input["width"] = (
                SIDE_MULTIPLE_PX * self._random.randint(8, 40) for _ in range(2)
            )
        elif kind == "any fields":
            job_input = valid(self._random)
        elif kind == "picture at an address":
            job_input["image_url"] = self._server.address("good", "token=1")
        elif kind == "uploaded":
            count = job_input["num_images"]
            job_input["upload_urls"] = [self._server.address("good", str(i)) for i in range(count)]
        elif kind == "LoRA of the Hub":
            number = self._random.randrange(HUB_LORAS)
            job_input["loras"] = [{"path": f"own/loras/{HUB_LORA}{number}{SUFFIX}"}]
        elif kind == "any sampler":
            sampler, schedule = self._random.choice(SAMPLERS_AND_SCHEDULES)
            job_input |= {"scheduler": sampler, "schedule": schedule}
        elif kind == "cancelled":
            job_input = {**LONG, **self._random.choice(({}, SHAPES["LoRAs and an embedding"]))}
            cancel_at = now + self._random.uniform(0, CANCELLED_WITHIN_SECONDS)
        self._waiting[self._endpoint.run(job_input)] = Sent(kind, job_input, now, cancel_at)

    def _cancel_due(self) -> None:
        now = time.monotonic()
        for job_id, sent in list(self._waiting.items()):
            if sent.cancel_at is not None and now > sent.cancel_at:
                self._endpoint.call(f"cancel/{job_id}", {})

    def _finished(self) -> dict[str, dict[str, Any]]:
        """The answers about jobs that have ended, or should have long ago."""
        waiting = dict(self._waiting)
        jobs = {job.id: job for job in self._endpoint.jobs if job.id in waiting}
        now = time.monotonic()
        return {
            job_id: jobs[job_id].for_client()
            for job_id, sent in waiting.items()
            if jobs[job_id].is_finished or now - sent.at > STUCK_SECONDS
        }

    def _judge(
        self, result: Result, what: str, sent: Sent, job_id: str, answer: dict[str, Any]
    ) -> None:
        result.delivered_again += bool(answer.get("retries"))
        if sent.kind == "cancelled":
            if answer["status"] not in ("CANCELLED", "COMPLETED"):
                result.wrong.append(f"{what}: {answer}")
            return
        posts = self._endpoint.record.posts_of(job_id, "result")
        accepted = sum(post.receipt is Receipt.ACCEPTED for post in posts)
        if accepted == 0:
            result.lost.append(f"{what}: {answer['status']}")
            return
        if accepted > 1:
            result.doubled.append(what)
        must_be = {"refused": ("FAILED",), "any fields": ()}.get(sent.kind, ("COMPLETED",))
        complaint = unreadable_answer(answer, *must_be, asked=sent.job_input)
        output = answer.get("output") or {}
        if complaint is None and sent.kind != "any fields" and "warning" in output:
            complaint = output["warning"]
        if complaint:
            result.wrong.append(f"{what}: {complaint}")
        elif sent.kind in REPEATED:
            key = json.dumps(sent.job_input)
            result.repeated += key in self._answers
            if self._answers.setdefault(key, output) != output:
                result.changed.append(what)

    def _kill_one(self) -> bool:
        """Kill a worker that is at work; False where there is none."""
        at_work = {job.worker_id for job in self._endpoint.jobs if job.status == "IN_PROGRESS"}
        others = [
            worker
            for worker in self._endpoint.workers
            if worker.id in at_work and worker.id != self._survivor.id
        ]
        if others:
            self._random.choice(others).kill()
        return bool(others)

    def _sample(self, done: int) -> Sample:
        process = self._process
        with process.oneshot():
            return Sample(
                done,
                round(process.memory_info().rss / 1e6, 1),
                process.num_fds(),
                process.num_threads(),
                len(process.children(recursive=True)),
            )

    def _left_in_the_worker(self, samples: list[Sample]) -> list[str]:
        """What it holds at rest, above the most that it held until all kinds had been seen."""
        early = settling(samples)

        def over() -> list[str]:
            now = self._sample(0)
            counts = {
                name: (getattr(now, name), more + max(getattr(one, name) for one in early))
                for name, more in MORE_MAX.items()
            }
            return [
                f"{has} {name}, more than {most}"
                for name, (has, most) in counts.items()
                if has > most
            ]

        came_true(lambda: not over(), 5)
        return over()


def measure(
    *, jobs: int, kills: int, seed: int, workers: int = 3, tick: Callable[[], object] = lambda: None
) -> Result:
    """Run, stop the workers, and look for what they left on the machine."""
    with (
        tempfile.TemporaryDirectory() as temporary,
        tempfile.TemporaryDirectory() as own,
        HostileServer(_hub_loras()) as server,
    ):
        write_loras(Path(own) / "loras")
        write_models(Path(own) / "models")
        environment = {
            "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
            "TMPDIR": temporary,
            "LORA_DIR": f"{own}/loras",
            "MODELS_DIR": f"{own}/models",
            "LORA_CACHE_DIR": f"{own}/cache",
            "LORA_CACHE_GB": f"{LORA_CACHE_BYTES / 1e9}",
            "HF_ENDPOINT": server.origin,
        }
        endpoint = real_workers(
            workers, environment=environment, command=(sys.executable, "-c", WORKER)
        )
        rules = dataclasses.replace(endpoint.options.rules, max_retries=MAX_RETRIES)
        endpoint.options = dataclasses.replace(endpoint.options, rules=rules)
        seen: dict[str, Worker] = {}

        def note_and_tick() -> None:
            seen.update((worker.id, worker) for worker in endpoint.workers)
            tick()

        with endpoint:
            result = LongRun(endpoint, server, seed).drive(jobs, kills, note_and_tick)
        groups = {worker.pid for worker in seen.values()}
        came_true(lambda: not _processes_of(groups), 5)
        result.left_behind += [f"process {process}" for process in _processes_of(groups)]
        files = [path.name for path in Path(temporary).iterdir()]
        result.left_behind += [f"file {name}" for name in files if not name.startswith(CACHE)]
    return result


def _hub_loras() -> dict[str, Behaviour]:
    files = [file_bytes(lora(10 + number)) for number in range(HUB_LORAS)]
    return {
        f"{HUB_LORA}{number}": once(with_length(data, len(data)))
        for number, data in enumerate(files)
    }


def _processes_of(groups: set[int]) -> list[int]:
    """Processes of the workers' own process groups."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) in groups:
                found.append(pid)
        except ProcessLookupError:
            continue
    return found


def draw_chart(result: Result, path: Path) -> None:
    """Memory over the jobs, with the allowed growth."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "long run", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.subplots()
        jobs = [one.jobs for one in result.samples]
        axes.plot(jobs, [one.memory_mb for one in result.samples], label="memory, MB")
        axes.plot(jobs, [one.handles for one in result.samples], label="file handles")
        axes.plot(jobs, [one.threads for one in result.samples], label="threads")
        axes.set(xlabel=f"jobs ({result.killed} kills, {result.faults} faults)", ylim=(0, None))
        axes.set_title("A worker that lives through the run", fontsize=10)
        axes.legend(loc="center right", fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def write(result: Result, path: Path, seed: int) -> None:
    figures = {**common.machine(), "seed": seed, **dataclasses.asdict(result)}
    figures |= {"growth": round(result.growth, 4), "settled_after": SETTLED_AFTER}
    figures["missed"] = result.missed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2000, help="(default: 2000)")
    parser.add_argument("--kills", type=int, default=20, help="of workers (default: 20)")
    parser.add_argument("--workers", type=int, default=3, help="(default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of jobs, faults and kills")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    parser.add_argument("--chart", type=Path, default=CHART)
    arguments = parser.parse_args()
    with tqdm(total=arguments.jobs, unit="job", dynamic_ncols=True) as bar:
        result = measure(
            jobs=arguments.jobs,
            kills=arguments.kills,
            seed=arguments.seed,
            workers=arguments.workers,
            tick=bar.update,
        )
    write(result, arguments.out / "long_run.json", arguments.seed)
    draw_chart(result, arguments.chart)
    print(
        f"{result.jobs} jobs in {result.seconds:.0f} s, {result.killed} kills, {result.faults} "
        f"faults: {len(result.lost)} lost, {len(result.doubled)} doubled, {len(result.wrong)} "
        f"wrong, {result.delivered_again} delivered again; {result.repeated} repeated, "
        f"{len(result.changed)} of them changed; {result.downloads} downloads; "
        f"memory {result.growth:+.1%}"
    )
    for words in result.missed:
        print(f"missed: {words}")
    return int(bool(result.missed))


if __name__ == "__main__":
    sys.exit(main())
