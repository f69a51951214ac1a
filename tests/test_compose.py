"""docker-compose.yml. There is no Docker here: it is checked by Compose's schema, against the
settings and the Dockerfile, and its health check is run."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from sdxl_worker.serving.ending import HURRIED_SECONDS
from sdxl_worker.serving.http_server import ANSWERED_WITHIN_SECONDS, LAST_ANSWERS_SECONDS
from sdxl_worker.settings import Settings
from tests.support import REPOSITORY
from tools import docs

COMPOSE = yaml.safe_load(docs.COMPOSE.read_text(encoding="utf-8"))
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WORKERS = {name: service for name, service in SERVICES.items() if "build" in service}
HOME = PurePosixPath("/home/worker")
EVERY_WORKER = pytest.mark.parametrize("worker", WORKERS.values(), ids=list(WORKERS))


def mounts(worker: dict[str, Any]) -> dict[PurePosixPath, str]:
    """Where each volume is in the container: what it is, and ":ro" where it is read-only."""
    found = {}
    for volume in worker["volumes"]:
        # A source may have a default, with a colon before it.
        parts = re.fullmatch(r"((?:\$\{[^}]*\})?[^:]*):([^:]+)(:ro)?", volume)
        assert parts, volume
        found[PurePosixPath(parts[2])] = parts[1] + (parts[3] or "")
    return found


def test_it_is_as_compose_has_it() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    ran = subprocess.run([*command, docs.COMPOSE], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_one_command_serves_on_a_gpu_and_another_one_without() -> None:
    assert set(WORKERS) == {"worker", "cpu"}
    gpu, cpu = WORKERS["worker"], WORKERS["cpu"]
    assert "profiles" not in gpu, "`docker compose up` starts it"
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert cpu["profiles"] == ["cpu"]
    assert "deploy" not in cpu
    assert cpu["build"]["args"]["MODEL"] == "shapes"
    assert f"ENV MODEL_DIR={cpu['environment']['MODEL_DIR']}\n" in DOCKERFILE


def test_the_image_is_the_published_one_and_the_miniature_model_s_never_takes_its_name() -> None:
    assert WORKERS["worker"]["image"] == docs.tagged_image()
    assert WORKERS["worker"]["build"]["args"]["MODEL"] == "sdxl", "as the workflow builds it"
    assert WORKERS["cpu"]["pull_policy"] == "build"
    assert "/" not in WORKERS["cpu"]["image"]


@EVERY_WORKER
def test_each_variable_is_a_setting_and_each_build_argument_one_of_the_dockerfile(
    worker: dict[str, Any],
) -> None:
    settings = {name.upper() for name in Settings.model_fields}
    assert set(worker["environment"]) <= settings
    assert set(worker["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert f" AS model-{worker['build']['args']['MODEL']}\n" in DOCKERFILE


@EVERY_WORKER
def test_nobody_serves_without_a_key(worker: dict[str, Any]) -> None:
    key = worker["environment"]["API_KEY"]
    assert re.fullmatch(r"\$\{API_KEY:\?.*\.env.*\}", key), "Compose stops, and says where it goes"
    [port] = worker["ports"]
    assert port == f"${{BIND:-127.0.0.1}}:8000:{worker['environment']['PORT']}"


def test_what_it_takes_from_the_environment_is_in_the_guide() -> None:
    text = docs.COMPOSE.read_text(encoding="utf-8")
    guide = docs.DEPLOY.read_text(encoding="utf-8").partition("| in `.env` | |")[2]
    told = set(re.findall(r"^\| `(\w+)` \|", guide.partition("\n\n")[0], re.MULTILINE))
    assert told == set(re.findall(r"\$\{(\w+)", text))


@EVERY_WORKER
def test_what_the_worker_reads_and_writes_is_mounted(worker: dict[str, Any]) -> None:
    places = mounts(worker)
    variables = worker["environment"]
    for name in ("MODELS_DIR", "LORA_DIR"):
        assert places[PurePosixPath(variables[name])].endswith(":ro")
    assert places[HOME] in COMPOSE["volumes"]
    for name in ("LORA_CACHE_DIR", "COMPILE_CACHE_DIR"):
        assert PurePosixPath(variables[name]).parent == HOME
    assert worker["read_only"] is True
    # By default Docker lets nothing be executed there, but torch.compile does.
    assert worker["tmpfs"] == ["/tmp:exec,mode=1777"]  # noqa: S108


def test_the_folders_are_those_of_the_tree_that_is_drawn() -> None:
    drawn = (REPOSITORY / "docs" / "volumes.md").read_text(encoding="utf-8")
    for place, source in mounts(WORKERS["worker"]).items():
        if place != HOME:
            assert source == f"${{VOLUME:-./volume}}/{place.name}:ro"
            assert f"─ {place.name}/ " in drawn or f"─ {place.name}/\n" in drawn
            assert place.parent == PurePosixPath("/runpod-volume")


@EVERY_WORKER
def test_it_is_never_root(worker: dict[str, Any]) -> None:
    assert worker["user"] == "worker"
    assert "useradd --uid 10001 --create-home --shell /usr/sbin/nologin worker" in DOCKERFILE
    assert worker["cap_drop"] == ["ALL"]
    assert worker["security_opt"] == ["no-new-privileges:true"]


@EVERY_WORKER
def test_it_comes_back_and_has_time_to_finish_its_jobs(worker: dict[str, Any]) -> None:
    assert worker["restart"] == "unless-stopped"
    drain_seconds = ANSWERED_WITHIN_SECONDS + HURRIED_SECONDS + LAST_ANSWERS_SECONDS
    minutes = worker["stop_grace_period"].removesuffix("m")
    assert drain_seconds <= int(minutes) * 60 <= drain_seconds + 60
    assert ANSWERED_WITHIN_SECONDS == 5.5 * 60, "as docs/deploy.md says"


@pytest.fixture(scope="module")
def pinged() -> Iterator[HTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.path == "/ping"
            self.send_response(self.server.status if asked else 404)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def is_healthy(port: int) -> bool:
    """By the check's own command, which finds its server on another port."""
    for worker in WORKERS.values():
        assert worker["healthcheck"] is WORKERS["worker"]["healthcheck"]
    kind, program, *arguments = WORKERS["worker"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python"), "there is no curl in the image"
    [option, script] = arguments
    changed, count = re.subn(r"\b8000\b", str(port), script)
    assert count == 1
    environment = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    ran = subprocess.run(
        [sys.executable, option, changed], env=environment, capture_output=True, timeout=60
    )
    return ran.returncode == 0


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (204, False), (503, False)])
def test_a_worker_is_healthy_when_it_is_ready(
    pinged: HTTPServer, status: int, healthy: bool
) -> None:
    pinged.status = status  # type: ignore[attr-defined]
    assert is_healthy(pinged.server_port) is healthy


def test_a_worker_that_does_not_answer_is_not_healthy() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    assert not is_healthy(port)


def test_prometheus_asks_whichever_worker_there_is() -> None:
    service = SERVICES["prometheus"]
    assert service["profiles"] == ["metrics"]
    assert re.fullmatch(r"prom/prometheus:v\d+\.\d+\.\d+", service["image"])
    assert service["ports"] == ["127.0.0.1:9090:9090"]
    assert service["configs"] == [
        {"source": "prometheus", "target": "/etc/prometheus/prometheus.yml"}
    ]
    [job] = yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])["scrape_configs"]
    [[target]] = [one["targets"] for one in job["static_configs"]]
    host, _, port = target.partition(":")
    for worker in WORKERS.values():
        assert worker["networks"]["default"]["aliases"] == [host]
        assert worker["environment"]["PORT"] == port
    assert job["authorization"]["credentials"] == "${METRICS_KEY:-${API_KEY}}"
