"""What runs on GitHub. It cannot run here, so its shape is checked, and the shell that can run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sdxl_worker
from tests.support import REPOSITORY
from tools import docs, publisher

GITHUB = REPOSITORY / ".github"
LOCKS = [*REPOSITORY.glob("*.lock"), *REPOSITORY.glob("builder/*.lock")]
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def _load(path: Path) -> dict[Any, Any]:
    # YAML takes the key `on` for the boolean true.
    return yaml.safe_load(path.read_text(encoding="utf-8"))


TEST = _load(GITHUB / "workflows" / "test.yml")
AUDIT = _load(GITHUB / "workflows" / "audit.yml")
PUBLISH = _load(GITHUB / "workflows" / "publish.yml")


def _scripts(workflow: dict[Any, Any]) -> list[str]:
    return [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("github-workflows", WORKFLOWS),
        ("dependabot", [GITHUB / "dependabot.yml"]),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [docs.ISSUE_CONFIG]),
    ],
)
def test_github_s_files_are_as_github_has_them(schema: str, paths: list[Path]) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    ran = subprocess.run([*command, *paths], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit_that_a_comment_names(path: Path) -> None:
    uses = re.findall(r"\buses:(.*)", path.read_text(encoding="utf-8"))
    assert uses
    for line in uses:
        assert re.fullmatch(r" actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_do_little_and_does_not_run_beside_itself_or_for_ever(path: Path) -> None:
    workflow = _load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 180
        written = [name for name, access in job.get("permissions", {}).items() if access != "read"]
        assert written == (["packages"] if path.name == "publish.yml" else [])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_text_of_the_event_is_pasted_into_a_script(path: Path) -> None:
    assert all("${{" not in script for script in _scripts(_load(path)))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_scripts_are_valid_shell(path: Path) -> None:
    for script in _scripts(_load(path)):
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_each_push_and_pull_request_runs_what_a_change_must_pass() -> None:
    assert set(TEST[True]) == {"push", "pull_request"}
    [test] = [step for step in TEST["jobs"]["test"]["steps"] if "run" in step]
    assert test["run"] == "make lint types test"
    assert test["env"] == {"REQUIRE_CHROMIUM": "1"}, "else the page's tests may be skipped"
    assert "make image-test" in " ".join(_scripts(TEST))


def test_what_the_image_installs_is_audited_each_week_and_with_each_change_of_it() -> None:
    assert set(AUDIT[True]) == {"schedule", "pull_request"}
    [schedule] = AUDIT[True]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
    scripts = _scripts(AUDIT)
    assert scripts == ["make lock && git diff --exit-code", "make audit"]
    watched = AUDIT[True]["pull_request"]["paths"]
    assert watched[0] == "**requirements*"
    assert (REPOSITORY / "Makefile").is_file()
    assert "Makefile" in watched


def test_the_audit_reads_every_lock_and_fails_where_it_could_not_look() -> None:
    command = subprocess.run(
        ["make", "--dry-run", "--always-make", "audit"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.partition("pip-audit ")[2]
    assert {"--strict", "--disable-pip", "--require-hashes"} <= set(command.split())
    locks = {path.relative_to(REPOSITORY).as_posix() for path in LOCKS}
    assert locks == set(re.findall(r"--requirement (\S+)", command))


def test_dependabot_watches_requirements_actions_and_the_base_image() -> None:
    updates = _load(GITHUB / "dependabot.yml")["updates"]
    assert {one["package-ecosystem"] for one in updates} == {"pip", "github-actions", "docker"}
    [pip] = [one for one in updates if one["package-ecosystem"] == "pip"]
    folders = {str(path.parent.relative_to(REPOSITORY)) for path in LOCKS}
    assert {folder.strip("/") or "." for folder in pip["directories"]} == folders


def test_a_release_and_nothing_else_publishes_the_image() -> None:
    assert PUBLISH[True] == {"release": {"types": ["released"]}}
    build = _scripts(PUBLISH)[-1]
    for part in (
        "--build-arg MODEL=sdxl",
        '--tag "$IMAGE:$GITHUB_REF_NAME" --tag "$IMAGE:latest"',
        "--provenance mode=max --sbom true",
        "--cache-from",
    ):
        assert part in build


@pytest.mark.parametrize(
    ("tag", "status"), [(f"v{sdxl_worker.__version__}", 0), ("v0.0.1", 1), ("main", 1)]
)
def test_a_release_of_another_version_than_the_code_is_refused(tag: str, status: int) -> None:
    [check] = [script for script in _scripts(PUBLISH) if "__version__" in script]
    environment = {**os.environ, "GITHUB_REF_NAME": tag}
    ran = subprocess.run(
        ["bash", "-e", "-c", check], cwd=REPOSITORY, env=environment, capture_output=True
    )
    assert ran.returncode == status


@pytest.mark.parametrize("repository", [publisher.publisher(), "somebody/worker-sdxl"])
def test_the_image_is_pushed_under_the_name_that_the_documents_tell_or_not_at_all(
    repository: str, tmp_path: Path
) -> None:
    [check] = [script for script in _scripts(PUBLISH) if "tools.publisher" in script]
    written = tmp_path / "environment"
    environment = {
        "GITHUB_REPOSITORY": repository,
        "GITHUB_ENV": str(written),
        # The runner's Python has nothing installed.
        "PATH": f"{_bare_python(tmp_path)}{os.pathsep}{os.environ['PATH']}",
    }
    ran = subprocess.run(
        ["bash", "-e", "-c", check], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    if repository == publisher.publisher():
        assert ran.returncode == 0, ran.stderr
        name, _, image = written.read_text().strip().partition("=")
        assert name == "IMAGE"
        assert docs.tagged_image() == f"{image}:v{sdxl_worker.__version__}"
        assert image == image.lower(), "as registries have it"
    else:
        assert ran.returncode == 1
        assert ran.stdout.startswith("::error::pyproject.toml names ")
        assert not written.exists()
    # What the script above leaves is all that names the image.
    assert [script for script in _scripts(PUBLISH) if "ghcr.io" in script] == []
    assert "env" not in PUBLISH
    assert "env" not in PUBLISH["jobs"]["image"]


def _bare_python(folder: Path) -> Path:
    (folder / "bin").mkdir()
    starter = folder / "bin" / "python3"
    starter.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    starter.chmod(0o755)
    return starter.parent


def test_a_report_asks_for_what_helps_and_a_vulnerability_goes_elsewhere() -> None:
    assert {form.name for form in FORMS} == {"bug.yml", "feature.yml"}
    bug = _load(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")
    fields = {field["id"]: field for field in bug["body"] if "id" in field}
    needed = {
        name for name, field in fields.items() if field.get("validations", {}).get("required")
    }
    assert needed == {"happened", "input", "version", "where", "check"}
    assert "log" in fields
    assert '{"input": {"check": true}}' in fields["check"]["attributes"]["description"]
    [link] = _load(docs.ISSUE_CONFIG)["contact_links"]
    assert link["url"] in (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    for path in re.findall(r"\(\.\./blob/main/([^)]+)\)", bug["body"][0]["attributes"]["value"]):
        assert (REPOSITORY / path).is_file()
    assert (GITHUB / "pull_request_template.md").is_file()
