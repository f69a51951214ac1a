"""A worker on the real SDK, without a model: its job's input says what to do."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import runpod


async def handler(job: dict[str, Any]) -> Any:
    """Do what the input says, in this order; answer with the input where it says nothing else."""
    job_input = job["input"]
    print(f"started {job['id']}")
    for progress in job_input.get("progress", []):
        runpod.serverless.progress_update(job, progress)
        await asyncio.sleep(job_input.get("progress_gap_seconds", 0.2))
    try:
        await asyncio.sleep(job_input.get("sleep_seconds", 0))
    except asyncio.CancelledError:
        print(f"told to stop {job['id']}")
        raise
    if "exit_status" in job_input:
        os._exit(job_input["exit_status"])
    if "raise" in job_input:
        raise ValueError(job_input["raise"])
    if "return" in job_input:
        return job_input["return"]
    if "text_bytes" in job_input:
        return {"text": "x" * job_input["text_bytes"]}
    if "late_progress" in job_input:
        asyncio.get_running_loop().call_later(
            1, runpod.serverless.progress_update, job, job_input["late_progress"]
        )
    return {"input": job_input, "job_keys": sorted(job)}


async def stream(job: dict[str, Any]) -> AsyncIterator[Any]:
    for chunk in job["input"]["chunks"]:
        await asyncio.sleep(job["input"].get("gap_seconds", 0))
        yield chunk


def main() -> None:
    concurrency = int(os.environ.get("TINY_WORKER_CONCURRENCY", "1"))
    runpod.serverless.start(
        {
            "handler": stream if os.environ.get("TINY_WORKER_STREAMS") else handler,
            "concurrency_modifier": lambda _: concurrency,
        }
    )


if __name__ == "__main__":
    main()
