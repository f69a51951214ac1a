"""What Prometheus is told."""

import re
from collections.abc import Iterator

import pytest
import yaml
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families

from sdxl_worker import gpu
from sdxl_worker.serving import logs
from sdxl_worker.serving.answering import Outcome
from sdxl_worker.serving.metrics import TURNED_AWAY, Metrics
from sdxl_worker.serving.places import Places
from tests.http_worker import QUICK, HttpWorker, http_worker
from tests.support import PROMPT, REPOSITORY

PRIVATE = "a word that nobody else says"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpWorker]:
    with http_worker(tmp_path_factory.mktemp("worker")) as running:
        running.wait_until_ready()
        yield running


def test_jobs_pictures_and_stages_are_counted(worker: HttpWorker) -> None:
    before = worker.metrics()
    assert before["sdxl_model_loaded"] == 1
    assert worker.generate(**QUICK, num_images=3).status_code == 200
    assert worker.generate(check=True).status_code == 200
    assert worker.generate(height=65).status_code == 400
    after = worker.metrics()

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert gained('sdxl_jobs_total{outcome="done"}') == 2
    assert gained('sdxl_jobs_total{outcome="refused"}') == 1
    assert gained('sdxl_jobs_total{outcome="failed"}') == 0
    assert gained("sdxl_pictures_total") == 3
    assert gained('sdxl_stage_seconds_count{stage="generate"}') == 2
    assert gained('sdxl_stage_seconds_count{stage="encode"}') == 1
    # What is wrong does not wait for its turn.
    assert gained('sdxl_stage_seconds_count{stage="wait"}') == 2
    assert gained('sdxl_stage_seconds_count{stage="job"}') == 2
    assert gained('sdxl_stage_seconds_sum{stage="generate"}') > 0
    assert after["sdxl_jobs_waiting"] == after["sdxl_jobs_running"] == 0
    assert after["process_resident_memory_bytes"] > 100e6


def test_prometheus_can_read_it_and_no_caller_is_in_it(worker: HttpWorker) -> None:
    answer = worker.generate(**{**QUICK, "prompt": PRIVATE}, seed=123454321)
    worker.generate(**{**QUICK, "scheduler": PRIVATE})
    with worker.client() as client:
        client.post("/generate", content=PRIVATE)
        client.get("/" + PRIVATE)
        response = client.get("/metrics")
    assert response.headers["content-type"] == CONTENT_TYPE_PLAIN_0_0_4
    for told in (PRIVATE, "nobody", PROMPT, "123454321", answer.headers["x-job-id"]):
        assert told not in response.text
    families = list(text_string_to_metric_families(response.text))
    labels = {
        (name, value)
        for family in families
        for sample in family.samples
        for name, value in sample.labels.items()
        if name != "le"
    }
    outcomes = {("outcome", one) for one in [*(o.value for o in Outcome), TURNED_AWAY]}
    stages = {label for label in labels if label[0] == "stage"}
    assert labels == outcomes | stages
    assert {value for _, value in stages} <= set(stages_in_the_code())
    assert all(family.documentation for family in families)


def stages_in_the_code() -> list[str]:
    modules = (REPOSITORY / "sdxl_worker" / "serving").glob("*.py")
    code = "".join(module.read_text(encoding="utf-8") for module in modules)
    return ["wait", "job", *re.findall(r'\btimed\("(\w+)"', code)]


def test_the_document_lists_each_of_them(worker: HttpWorker) -> None:
    with worker.client() as client:
        text = client.get("/metrics").text
    names = {f"sdxl_{name}" for name in re.findall(r"^# TYPE sdxl_(\w+)", text, re.MULTILINE)}
    names |= {"sdxl_gpu_memory_allocated_bytes", "sdxl_gpu_memory_peak_bytes"}
    document = (REPOSITORY / "docs" / "server.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(sdxl_\w+)", document)) == names
    for told in (*(one.value for one in Outcome), TURNED_AWAY, *stages_in_the_code()):
        assert f"`{told}`" in document
    [config] = re.findall(r"^```yaml\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    [job] = yaml.safe_load(config)["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["localhost:8000"]}]


def test_the_gpu_s_memory_is_told_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be seen without one: torch's numbers are those of the check's report."""
    monkeypatch.setattr(logs, "phase_listeners", [])
    metrics = Metrics(Places(1, 1))
    assert b"gpu_memory" not in metrics.text()
    monkeypatch.setattr(gpu, "allocated_bytes", lambda: 5_000_000_000)
    monkeypatch.setattr(gpu, "peak_memory_bytes", lambda: 7_000_000_000)
    text = metrics.text().decode()
    assert "sdxl_gpu_memory_allocated_bytes 5e+09" in text
    assert "sdxl_gpu_memory_peak_bytes 7e+09" in text


def test_openai_s_pictures_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "phase_listeners", [])
    metrics = Metrics(Places(1, 1))
    metrics.on_job("done", {"created": 1, "data": [{"b64_json": "aGk="}, {"b64_json": "aGk="}]})
    metrics.on_job("refused", {"error": "no"})
    metrics.on_job("done", {"object": "list", "data": [{"id": "a model"}]})
    assert b"sdxl_pictures_total 2.0" in metrics.text()
