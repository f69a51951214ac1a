"""What uploading adds to a job when the next one waits: it must not hold the GPU.

A real worker process on the local endpoint, with the embedded model, and a storage that takes its
time for each picture. All jobs are sent at once.

    python -m benchmarks.uploading --jobs 20 --upload-seconds 2
"""

import argparse
import http.server
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from local_endpoint.local import LocalEndpoint

JOB = {"prompt": "a red circle on a blue background", "num_inference_steps": 25}
THREADS = 1  # the local endpoint and the storage need the rest of a small machine


class SlowStorage(http.server.ThreadingHTTPServer):
    """Takes whatever is put there, after a while."""

    def __init__(self, seconds: float) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(seconds)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def measure(jobs: int, upload_seconds: float | None) -> dict[str, float]:
    """Without `upload_seconds`, the answers hold the pictures."""
    environment = {"OMP_NUM_THREADS": str(THREADS)}
    if upload_seconds is not None:
        storage = SlowStorage(upload_seconds)
        environment |= {
            "BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{storage.server_port}/pictures",
            "BUCKET_ACCESS_KEY_ID": "id",
            "BUCKET_SECRET_ACCESS_KEY": "secret",
        }
    with LocalEndpoint(workers=1, environment=environment) as endpoint:
        for seed in range(2):  # what only the first jobs cost
            endpoint.wait(endpoint.run({**JOB, "seed": seed}))
        started = time.monotonic()
        job_ids = [endpoint.run({**JOB, "seed": seed}) for seed in range(jobs)]
        answers = [endpoint.wait(job_id, timeout_seconds=600) for job_id in job_ids]
        seconds = time.monotonic() - started
    failed = [answer for answer in answers if answer["status"] != "COMPLETED"]
    is_link = [answer["output"]["image_url"].startswith("http") for answer in answers]
    if failed or is_link != [upload_seconds is not None] * jobs:
        raise RuntimeError(f"{len(failed)} jobs failed: {failed[:1]}")
    return {
        "seconds": round(seconds, 1),
        "jobs_per_minute": round(60 * jobs / seconds, 1),
        "execution_s": round(statistics.median(one["executionTime"] for one in answers) / 1000, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=20, help="for each row (default: 20)")
    parser.add_argument("--upload-seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()
    result = {
        **common.machine(),
        "threads": THREADS,
        "jobs": arguments.jobs,
        "upload_s": arguments.upload_seconds,
        "inline": measure(arguments.jobs, None),
        "uploaded": measure(arguments.jobs, arguments.upload_seconds),
    }
    text = json.dumps(result, indent=2) + "\n"
    (arguments.out / "uploading.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
