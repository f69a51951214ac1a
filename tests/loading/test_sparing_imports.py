"""What the worker's start leaves out, and that nothing misses it."""

import json
import subprocess
import sys
from typing import Any

from tests.support import decoded, picture

JOB = {"prompt": "a red circle", "seed": 5, "num_inference_steps": 3, "scheduler": "KLMS"}

PROGRAM = """
import asyncio, json, sys
import handler
from sdxl_worker.loading import weights
from sdxl_worker.serving.start import start
from sdxl_worker.settings import Settings

start_reading = weights.start_reading
imported_at_reading = []

def recorded(*arguments):
    imported_at_reading.extend({"diffusers", "transformers"} & set(sys.modules))
    return start_reading(*arguments)

weights.start_reading = recorded
start(Settings()).result()
unused = ("scipy", "torchao", "diffusers.models.transformers.auraflow_transformer_2d")
imported = [name for name in unused if name in sys.modules]
output = asyncio.run(handler.handler({"id": "1", "input": json.loads(sys.argv[1])}))
import transformers.models
from diffusers.models.transformers import SD3Transformer2DModel
asked_for = [transformers.models.bert.__name__, SD3Transformer2DModel.__name__]
print(json.dumps({"imported": imported, "asked_for": asked_for, "output": output,
    "imported_at_reading": imported_at_reading}))
"""


def started() -> dict[str, Any]:
    """A worker's start and a job, in a process that has imported nothing yet."""
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(JOB)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_the_start_leaves_out_what_sdxl_does_not_use_and_nothing_misses_it() -> None:
    result = started()
    assert result["imported"] == []
    assert result["imported_at_reading"] == [], "the weights are read while these are imported"
    # Whoever asks gets it: the sampler that needs scipy, and the packages that were postponed.
    assert result["asked_for"] == ["transformers.models.bert", "SD3Transformer2DModel"]
    drawn = decoded(result["output"]["image_url"])
    assert drawn.tobytes() == picture(**JOB).tobytes()
