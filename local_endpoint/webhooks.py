"""Telling a job's webhook that the job has ended."""

import asyncio
import time
from typing import Any

import aiohttp

from local_endpoint.queue import Rules
from local_endpoint.record import Record, WebhookCall

ANSWER_SECONDS = 10


async def call_webhook(url: str, job: dict[str, Any], rules: Rules, record: Record) -> None:
    """POST the whole job to `url`, again after a delay while the answer is not 2xx.

    A webhook that cannot be reached changes nothing about the job.
    """
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for attempt in range(rules.webhook_attempts):
            if attempt:
                await asyncio.sleep(rules.webhook_delay_seconds)
            status_code = None
            try:
                async with session.post(url, json=job) as response:
                    status_code = response.status
            except (aiohttp.ClientError, TimeoutError, ValueError):
                pass  # no answer, or no URL
            record.webhook_calls.append(WebhookCall(time.monotonic(), url, job["id"], status_code))
            if status_code is not None and 200 <= status_code < 300:
                return
