"""What the documents say is what the code does."""

import json
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import sdxl_worker
from sdxl_worker.errors import RequestError
from sdxl_worker.openai_images import GENERATIONS, parse_openai_call
from sdxl_worker.outputs.bucket import bucket_of_job, locate
from sdxl_worker.request import parse_request
from tests import tutorial
from tests.support import REPOSITORY
from tools import docs

DOCUMENTS = [docs.README, docs.SECURITY, *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", docs.derived(), ids=lambda path: path.name)
def test_what_is_derived_from_the_code_is_as_the_code_has_it(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == docs.derived()[path], "run `make docs`"


def test_every_job_in_the_documents_is_accepted() -> None:
    jobs = [
        json.loads(block)
        for document in DOCUMENTS
        for block in _blocks(document, "json")
        if '"input"' in block
    ]
    assert len(jobs) >= 2
    for job in jobs:
        parse_request(job["input"])
        if "s3Config" in job:
            bucket_of_job(job["s3Config"], private_allowed=False)


def test_every_storage_is_set_up_as_its_guide_says() -> None:
    text = (REPOSITORY / "docs" / "storage.md").read_text(encoding="utf-8")
    regions = {}
    for row in re.findall(r"^\| .+ \| `https://.+ \|$", text, re.MULTILINE):
        for url in re.findall(r"`(https://[^`]+)`", row):
            endpoint = url.replace("ACCOUNT_ID", "0123456789abcdef" * 2)
            address, region, prefix = locate(endpoint, "pics", None)
            assert address.startswith("https://pics.") or address == f"{endpoint}/pics"
            assert prefix == ""
            regions[url.removeprefix("https://").partition(":")[0]] = region
    assert regions == {
        "s3.eu-west-1.amazonaws.com": "eu-west-1",
        "ACCOUNT_ID.r2.cloudflarestorage.com": "auto",
        "ACCOUNT_ID.eu.r2.cloudflarestorage.com": "auto",
        "s3.us-west-004.backblazeb2.com": "us-west-004",
        "storage.googleapis.com": "auto",
        "nyc3.digitaloceanspaces.com": "nyc3",
        "minio.example.com": "us-east-1",
        "s3api-eu-ro-1.runpod.io": "EU-RO-1",
    }


def test_the_guides_scripts_make_jobs_that_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("output").mkdir()
    Image.new("RGB", (128, 128)).save("output/20261101-120000-seed7.png")
    Image.new("RGB", (128, 128)).save("house.png")
    scripts = (
        ("inpainting", "mask_from_alpha"),
        ("storage", "upload_urls"),
        ("control", "controlnet"),
    )
    for name, field in scripts:
        # inpainting.md has a second one, which the tests of the platform send to a worker.
        script = _blocks(REPOSITORY / "docs" / f"{name}.md", "python")[0]
        exec(script, {})  # noqa: S102
        job = json.loads(Path("my_job.json").read_text())
        assert job["input"][field]
        parse_request(job["input"])


def test_the_errors_in_the_readme_are_the_worker_s() -> None:
    readme = docs.README.read_text(encoding="utf-8")
    [block] = re.findall(r"```json\n(\{\s*\"error\".*?\})\n```", readme, re.DOTALL)
    with pytest.raises(RequestError) as caught:
        parse_request({"prompt": "a cat", "height": 1001, "scheduler": "EULER"})
    assert json.loads(block)["error"] == str(caught.value)


def _blocks(document: Path, language: str) -> list[str]:
    """The document's code in that language, without the indentation of a list."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def _words(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "), comments=True)


def test_the_readme_s_way_to_a_picture_is_that_of_the_tutorial() -> None:
    # The tutorial's commands are run, as they are, in the tests of the local endpoint.
    commands = [block for block in _blocks(docs.README, "sh") if "api.runpod.ai" in block]
    assert [_words(command) for command in commands] == [
        _words(tutorial.RUN),
        _words(tutorial.SAVE),
    ]
    [script] = _blocks(docs.README, "python")
    assert script in (REPOSITORY / "tests" / "decode_image.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_job_in_a_command_is_accepted(document: Path) -> None:
    for block in _blocks(document, "sh"):
        for word in _words(block):
            if word.startswith("{"):
                body = json.loads(word)
                if document == docs.OPENAI:
                    call = {"openai_route": GENERATIONS, "openai_input": body}
                    assert parse_openai_call({"input": call})
                else:
                    parse_request(body["input"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_within_the_repository_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", text)
    for name, anchor in links:
        target = document.parent / name if name else document
        assert target.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_anchor, headings), f"{name}#{anchor}"


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_guides_are_reachable_from_the_readme() -> None:
    readme = docs.README.read_text(encoding="utf-8")
    for guide in (REPOSITORY / "docs").glob("*.md"):
        assert f"(docs/{guide.name})" in readme
    assert "(SECURITY.md)" in readme


def test_the_readme_shows_each_screenshot_that_the_script_takes() -> None:
    script = (REPOSITORY / "tools" / "page_screenshots.py").read_text(encoding="utf-8")
    taken = set(re.findall(r'"(page-\w+)"', script))
    shown = set(re.findall(r"\(docs/(page-\w+)\.png\)", docs.README.read_text(encoding="utf-8")))
    assert len(taken) == 5
    assert taken == shown == {path.stem for path in (REPOSITORY / "docs").glob("page-*.png")}


def test_messages_in_the_troubleshooting_are_the_worker_s() -> None:
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r'"([^"\n]+)"', re.sub(r"`[^`\n]*`", "", text))
    assert len(messages) >= 8
    sources = [REPOSITORY / "handler.py", *(REPOSITORY / "sdxl_worker").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\n\s*f?"', "", code)  # a message over several lines
    assert [message for message in messages if message not in code] == []


def test_the_example_of_costs_prints_what_the_text_says() -> None:
    [script] = _blocks(docs.DEPLOY, "python")
    text = docs.DEPLOY.read_text(encoding="utf-8")
    for jobs in (1, 100):
        changed = script.replace("jobs, pictures = 1, 1", f"jobs, pictures = {jobs}, 1")
        ran = subprocess.run([sys.executable, "-c", changed], capture_output=True, check=True)
        cost = ran.stdout.decode().strip()
        assert f" {cost}" in text.partition("That prints")[2]


def test_the_deployment_guide_says_what_the_hub_s_listing_has() -> None:
    text = docs.DEPLOY.read_text(encoding="utf-8")
    config = json.loads(docs.HUB.read_text(encoding="utf-8"))["config"]
    first, *others = config["gpuIds"].split(",")
    assert f"`{first}`, then {', '.join(f'`{pool}`' for pool in others)} |" in text
    assert f"| Container disk | {config['containerDiskInGb']} GB |" in text
    for preset in config["presets"]:
        [(key, value)] = preset["defaults"].items()
        name = preset["name"].partition(":")[0]
        told = value if isinstance(value, str) else json.dumps(value)
        assert f"| {name} | `{key}={told}` |" in text


def test_the_version_is_told_once() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert project["version"] == sdxl_worker.__version__
    assert f"worker-sdxl:{sdxl_worker.__version__}" in docs.DEPLOY.read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == sdxl_worker.__version__  # type: ignore[index]


def test_requirements_are_pinned() -> None:
    for name in (
        "requirements.txt",
        "requirements-client.txt",
        "requirements-dev.txt",
        "builder/requirements.txt",
    ):
        for line in (REPOSITORY / name).read_text().splitlines():
            requirement = line.partition("#")[0].strip()
            if requirement and not requirement.startswith("-r "):
                assert re.fullmatch(r"[\w-]+==[\w.]+", requirement), requirement
    pins = (REPOSITORY / "requirements.txt").read_text()
    for pin in ("runpod==1.12.0", "diffusers==0.42.1", "transformers==5.23.0", "torch==2.13.0"):
        assert pin in pins


def test_the_worker_never_imports_the_local_endpoint() -> None:
    for path in [REPOSITORY / "handler.py", *(REPOSITORY / "sdxl_worker").rglob("*.py")]:
        assert "local_endpoint" not in path.read_text(encoding="utf-8"), path.name


def test_the_publisher_s_name_is_told_in_one_place() -> None:
    """Everywhere else it is written by `make docs`."""
    name = docs.publisher()
    tracked = subprocess.run(
        ["git", "grep", "--fixed-strings", "--count", name],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    counts = {path: int(count) for path, _, count in (line.rpartition(":") for line in tracked)}
    derived = {
        "README.md": docs.listing(),
        "SECURITY.md": docs.report(),
        ".runpod/hub.json": json.dumps(docs.icon_url()),
        ".github/ISSUE_TEMPLATE/config.yml": docs.report_url(),
        "docker-compose.yml": docs.tagged_image(),
        "docs/deploy.md": docs.images(),
    }
    lines_of = {
        path: sum(name in line for line in text.splitlines()) for path, text in derived.items()
    }
    assert counts == {"pyproject.toml": 1, **lines_of}


def test_whether_there_is_an_image_is_told_by_the_changelog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changelog = docs.CHANGELOG.read_text(encoding="utf-8")
    for heading, told in (("3.0.0 (not released yet)", True), ("3.0.0", False)):
        changed = re.sub(r"^## .+$", f"## {heading}", changelog, count=1, flags=re.MULTILINE)
        (tmp_path / "CHANGELOG.md").write_text(changed, encoding="utf-8")
        monkeypatch.setattr(docs, "CHANGELOG", tmp_path / "CHANGELOG.md")
        assert ("There is none yet" in docs.images()) is told


def test_the_readme_is_for_the_first_minute() -> None:
    text = docs.README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 225
    assert "not measured" not in text, "such rows wait in docs/speed.md"
