"""Jobs that are drawn side by side: each has its own answer, as if it were alone."""

import asyncio
import hashlib
import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import handler
from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.drawing.together import kind_of
from sdxl_worker.loading.models import Models
from sdxl_worker.serving import threads
from sdxl_worker.serving.progress import JobStopped, Progress
from sdxl_worker.serving.threads import start_on_gpu_thread
from sdxl_worker.settings import Settings
from sdxl_worker.speed import shared_passes
from tests.own_files import write_lora
from tests.serving.conftest import Platform
from tests.support import PROMPT, data_uri, decoded, largest_difference, models, noise_picture, run

JOB: dict[str, Any] = {
    "prompt": PROMPT,
    "seed": 3,
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "refiner_inference_steps": 0,
}
# Of 255: what another order of adding up leaves.
ROUNDING = 2
AT_ONCE = 8
SECONDS = 60


@pytest.fixture(autouse=True)
def _batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_JOBS", str(AT_ONCE))
    models()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each pass, how many drawings shared it."""
    seen: list[int] = []
    run_passes = shared_passes._run

    def counted(some: Any) -> Any:
        seen.append(len(some))
        return run_passes(some)

    monkeypatch.setattr(shared_passes, "_run", counted)
    return seen


def together(*job_inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to jobs of which none begins before all wait, or are refused."""

    models()  # with the settings of now, or their start would wait as well

    async def all_jobs() -> list[dict[str, Any]]:
        go = threading.Event()
        held = start_on_gpu_thread(go.wait, SECONDS)
        jobs = [
            asyncio.create_task(handler.handler({"id": f"job-{i}", "input": one}))
            for i, one in enumerate(job_inputs)
        ]
        while len(threads._gpu_queue._waiting) < sum(not job.done() for job in jobs):
            await asyncio.sleep(0.005)
        go.set()
        assert held.result(SECONDS)
        return await asyncio.gather(*jobs)

    return asyncio.run(all_jobs())


def assert_same(answer: dict[str, Any], alone: dict[str, Any]) -> None:
    assert answer.keys() == alone.keys(), answer.get("error")
    assert answer["seed"] == alone["seed"]
    pairs = zip(answer["images"], alone["images"], strict=True)
    assert all(largest_difference(decoded(a), decoded(b)) <= ROUNDING for a, b in pairs)


def test_each_job_gets_the_answer_it_would_get_alone(passes: list[int]) -> None:
    picture = data_uri(noise_picture(64, 64))
    jobs = [
        JOB,
        {**JOB, "prompt": "a yellow star", "seed": 2**40, "num_images": 2},
        {**JOB, "scheduler": "Euler a", "schedule": "trailing", "num_inference_steps": 7},
        {**JOB, "guidance_scale": 1, "refiner_inference_steps": 6, "strength": 0.5},
        {**JOB, "high_noise_frac": 0.5, "refiner_inference_steps": 4},
        {**JOB, "image_url": picture, "mode": "img2img", "mask_url": picture, "mask_blur": 2},
        {"prompt": PROMPT, "seed": 5, "image_url": picture, "num_inference_steps": 4},
        {**JOB, "upscale": {}},
    ]
    answers = together(*jobs)
    assert max(passes) >= 4
    for job, answer in zip(jobs, answers, strict=True):
        assert_same(answer, run(job))


def test_one_at_a_time_is_the_default(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCH_JOBS")
    alone = run(JOB)
    assert [answer["images"] for answer in together(JOB, JOB)] == [alone["images"]] * 2
    assert passes == []


def test_alone_a_job_s_bytes_are_those_without_batches(
    passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_batches = run(JOB)
    assert set(passes) == {1}
    monkeypatch.delenv("BATCH_JOBS")
    assert run(JOB) == with_batches


def test_formats_and_metadata_are_each_job_s_own() -> None:
    webp, png = together({**JOB, "output_format": "webp"}, {**JOB, "seed": 4})
    assert webp["image_url"].startswith("data:image/webp;base64,")
    picture = decoded(png["image_url"])
    assert json.loads(picture.info["request"])["seed"] == 4


def test_a_job_that_cannot_be_done_never_joins(passes: list[int]) -> None:
    missing = {**JOB, "loras": [{"path": "no-such.safetensors"}]}
    wrong, good, refused = together(
        {**JOB, "image_url": "data:image/png;base64,AA=="}, JOB, missing
    )
    assert "image_url" in wrong["error"]
    assert "loras[0].path" in refused["error"]
    assert_same(good, run(JOB))
    assert set(passes) == {1}


def weights() -> str:
    digest = hashlib.sha256()
    for network in models().networks().values():
        for tensor in network.state_dict().values():
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_jobs_with_the_same_loras_are_together_and_others_after_them(
    passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        write_lora(tmp_path / f"{name}.safetensors", seed=seed)
    monkeypatch.setenv("LORA_DIR", str(tmp_path))
    before = run(JOB)["images"]
    plain_weights = weights()
    lists: list[list[dict[str, Any]]] = [
        [{"path": "one.safetensors"}],
        [],
        [{"path": "one.safetensors"}, {"path": "two.safetensors", "scale": -1}],
    ]
    jobs = [{**JOB, "seed": i, **({"loras": lists[i % 3]} if i % 3 != 1 else {})} for i in range(9)]
    answers = together(*jobs)
    assert max(passes) == 3
    for job, answer in zip(jobs, answers, strict=True):
        assert_same(answer, run(job))
    assert run(JOB)["images"] == before
    assert weights() == plain_weights


def test_one_job_with_loras_fails_and_the_others_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    """Weights are put back for a failure, but not under the hands of those that draw with them."""
    write_lora(tmp_path / "one.safetensors", seed=1)
    monkeypatch.setenv("LORA_DIR", str(tmp_path))
    plain = run(JOB)["images"]
    plain_weights = weights()
    job = {**JOB, "loras": [{"path": "one.safetensors"}]}
    alone = run(job)
    assert alone["images"] != plain
    steps = 0

    def fail_once(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise JobStopped

    monkeypatch.setattr(Progress, "on_step", fail_once)
    answers = together(job, job, job)
    failed = [answer for answer in answers if "error" in answer]
    assert len(failed) == 1
    for answer in answers:
        if "error" not in answer:
            assert_same(answer, alone)
    assert patches_of(models()).key, "or what rounding lost would not be told of the others"
    assert run(JOB)["images"] == plain
    assert patches_of(models()).key == ()
    assert weights() == plain_weights
    assert max(passes) == 3


def test_a_job_that_is_cancelled_leaves_the_others_to_go_on(passes: list[int]) -> None:
    async def one_of_three() -> list[Any]:
        long = {**JOB, "num_inference_steps": 60}
        jobs = [
            asyncio.create_task(handler.handler({"id": str(i), "input": {**long, "seed": i}}))
            for i in range(3)
        ]
        while len(passes) < 5 or passes[-1] < 3:
            await asyncio.sleep(0.005)
        jobs[1].cancel()
        return await asyncio.gather(*jobs, return_exceptions=True)

    answers = asyncio.run(one_of_three())
    assert isinstance(answers[1], asyncio.CancelledError)
    assert passes[-1] == 2, "its rows are gone"
    assert_same(answers[0], run({**JOB, "num_inference_steps": 60, "seed": 0}))
    assert_same(answers[2], run({**JOB, "num_inference_steps": 60, "seed": 2}))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("odd")])
def test_what_fails_together_is_done_in_halves(
    error: RuntimeError, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = models().unet
    forward = unet.forward

    def limited(sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if len(sample) > 4:
            raise error
        return forward(sample, *arguments, **options)

    alone = run(JOB)
    monkeypatch.setattr(unet, "forward", limited)
    for answer in together(JOB, JOB, JOB, JOB):
        assert_same(answer, alone)
    again = not isinstance(error, torch.OutOfMemoryError)  # what has no memory is not tried again
    assert passes[-4:] == ([2, 4, 2, 2] if again else [2, 2, 2, 2])


def test_progress_and_previews_are_each_job_s_own(platform: Platform) -> None:
    together(
        {**JOB, "num_inference_steps": 40, "preview": True}, {**JOB, "num_inference_steps": 80}
    )
    of_jobs: dict[str, list[Any]] = {"job-0": [], "job-1": []}
    for _, path, body in platform.updates:
        [name] = [name for name in of_jobs if name in path]
        of_jobs[name].append(body["output"])
    assert {update["progress"]["steps"] for update in of_jobs["job-0"]} == {40}
    assert {update["progress"]["steps"] for update in of_jobs["job-1"]} == {80}
    assert all("preview" in update for update in of_jobs["job-0"])
    assert not any("preview" in update for update in of_jobs["job-1"])


def test_no_more_jobs_are_together_than_batch_jobs(
    passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_JOBS", "2")
    assert all("images" in answer for answer in together(JOB, JOB, JOB, JOB))
    assert max(passes) == 2


def test_a_check_is_made_alone_beside_others(passes: list[int]) -> None:
    answer, report = together({**JOB, "num_inference_steps": 10}, {"check": True})
    assert "images" in answer
    assert report.keys().isdisjoint({"error", "images"})
    assert max(passes) == 1


class _Kinds:
    """The rule, for a request that differs from another one in some fields."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(batch_jobs=4, **settings)

    def of(self, by: Models | None = None, **fields: Any) -> Any:
        from sdxl_worker.adapters.of_request import NO_ADAPTERS
        from sdxl_worker.drawing.stages import plan_stages
        from sdxl_worker.request import parse_request

        request = parse_request({**JOB, **fields})
        by = by or models()
        stages = plan_stages(request, by)
        return kind_of(request, stages, by, None, NO_ADAPTERS, self.settings)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a star", "negative_prompt": "a"},
        {"seed": 9, "num_images": 3},
        {"scheduler": "PNDM"},
        {"num_inference_steps": 9, "refiner_inference_steps": 9},
        {"guidance_scale": 1},
        {"high_noise_frac": 0.5, "refiner_inference_steps": 4},
        {"output_format": "jpeg", "preview": True},
        {"upscale": {}},
    ],
)
def test_what_may_differ_between_jobs_that_are_drawn_together(fields: dict[str, Any]) -> None:
    kinds = _Kinds()
    assert kinds.of(**fields) == kinds.of() is not None


def test_what_must_be_equal_and_what_is_drawn_alone() -> None:
    kinds = _Kinds()
    assert kinds.of(width=72) != kinds.of()
    other_dir = replace(models().model_dir, root=Path("other"))
    assert kinds.of(by=replace(models(), model_dir=other_dir)) != kinds.of()
    in_turn = replace(models().placement, resident=False)
    assert kinds.of(by=replace(models(), placement=in_turn)) is None
    assert kinds.of(check=True) is None
    url = "https://example.com/a.png"
    steered: dict[str, Any]
    for steered in (
        {"controlnet": [{"type": "canny", "image_url": url}]},
        {"ip_adapter": [{"image_url": url}]},
        {"hires": {}},
    ):
        assert kinds.of(**steered) is None
    assert _Kinds(step_cache=2).of() is None
    assert _Kinds(quantize="fp8").of() is None, "one scale for all rows of a pass"
    assert _Kinds(quantize="int8").of() is not None, "a scale for each row"


def test_random_mixes_of_jobs_are_all_answered(passes: list[int]) -> None:
    """Sizes, steps and samplers that come in any order, some of which cannot be done."""
    choose = random.Random(15)  # noqa: S311 - no secret
    jobs = []
    for i in range(24):
        size = choose.choice([64, 72, 80])
        job = {**JOB, "seed": i, "height": size, "width": size}
        job["num_inference_steps"] = choose.randint(1, 6)
        job["scheduler"] = choose.choice(["DDIM", "K_EULER", "DPMSolverMultistep"])
        jobs.append({**job, "height": 1001} if choose.random() < 0.1 else job)
    for job, answer in zip(jobs, together(*jobs), strict=True):
        if job["height"] == 1001:
            assert "height" in answer["error"]
        else:
            assert decoded(answer["image_url"]).size == (job["width"], job["height"])
    assert max(passes) > 3
