"""The commands of Runpod's tutorial for Stable Diffusion XL, as they are; only the host changes."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RUN = r"""curl -X POST https://api.runpod.ai/v2/ENDPOINT_ID/run \
    -H 'Content-Type: application/json'                             \
    -H 'Authorization: Bearer YOUR_API_KEY' \
    -d '{"input": {"prompt": "A cute fluffy white dog in the style of a Pixar animation 3D drawing."}}'
"""  # noqa: E501
STATUS = r"""curl https://api.runpod.ai/v2/ENDPOINT_ID/status/JOB_ID \
-H 'Content-Type: application/json' \
    -H 'Authorization: Bearer YOUR_API_KEY'"""
SAVE = r"""curl https://api.runpod.ai/v2/ENDPOINT_ID/status/JOB_ID \
    -H 'Content-Type: application/json' \
    -H 'Authorization: Bearer YOUR_API_KEY' | jq . > output.json"""

needs_curl = pytest.mark.skipif(
    shutil.which("curl") is None, reason="the tutorial's commands need curl"
)


def shell(url_base: str, folder: Path) -> Callable[[str], str]:
    """A function that runs a command of the tutorial in a folder and returns what it prints."""

    def run(command: str) -> str:
        command = command.replace("https://api.runpod.ai/v2", url_base)
        if shutil.which("jq") is None:  # optional in the tutorial
            command = command.replace("jq .", f"{sys.executable} -m json.tool")
        return subprocess.run(
            ["sh", "-c", command],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return run
