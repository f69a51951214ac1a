"""What the forms of an adapter's `path` mean."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from sdxl_worker.inputs.adapter_sources import (
    LocalFile,
    RemoteFile,
    SourceError,
    chosen,
    find_source,
    token_for,
)
from sdxl_worker.settings import Settings

COMMIT = "0123456789" * 4
HUB = "https://huggingface.co"


def remote(path: str, settings: Settings | None = None) -> RemoteFile:
    source = find_source(path, settings or Settings())
    assert isinstance(source, RemoteFile)
    return source


def refusal(path: str, settings: Settings | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        find_source(path, settings or Settings())
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "address", "name"),
    [
        ("a/b/c.safetensors", "/a/b/resolve/main/c.safetensors", "a/b/c.safetensors"),
        ("a/b/c d/e+.safetensors", "/a/b/resolve/main/c%20d/e%2B.safetensors", None),
        ("a/b/c.safetensors@v1.0", "/a/b/resolve/v1.0/c.safetensors", None),
        ("a/b/c.safetensors@refs/pr/2", "/a/b/resolve/refs%2Fpr%2F2/c.safetensors", None),
        (
            f"{HUB}/a/b/blob/main/c/d%20e.safetensors",
            "/a/b/resolve/main/c/d%20e.safetensors",
            "a/b/c/d e.safetensors@main",
        ),
        (
            f"{HUB}/a/b/resolve/refs%2Fpr%2F2/c.safetensors?download=true",
            "/a/b/resolve/refs%2Fpr%2F2/c.safetensors",
            "a/b/c.safetensors@refs/pr/2",
        ),
        (
            "https://hf.co/a/b/resolve/v1/c.safetensors",
            "/a/b/resolve/v1/c.safetensors",
            "a/b/c.safetensors@v1",
        ),
    ],
)
def test_a_file_of_the_hub(path: str, address: str, name: str | None) -> None:
    source = remote(path)
    assert (source.address, source.name) == (f"{HUB}{address}", name or path)
    assert source.listing is None
    assert not source.is_pinned


@pytest.mark.parametrize(
    ("path", "address", "name"),
    [
        ("a/b", "/api/models/a/b", "a/b"),
        ("a/b@v1", "/api/models/a/b/revision/v1", "a/b@v1"),
        ("a/b.c-d_e", "/api/models/a/b.c-d_e", "a/b.c-d_e"),
        (f"{HUB}/a/b", "/api/models/a/b", "a/b"),
        (f"{HUB}/a/b/", "/api/models/a/b", "a/b"),
        (f"{HUB}/a/b/tree/v1", "/api/models/a/b/revision/v1", "a/b@v1"),
    ],
)
def test_a_repository_of_the_hub_is_asked_for_its_file(path: str, address: str, name: str) -> None:
    source = remote(path)
    assert (source.address, source.name, source.listing) == (f"{HUB}{address}", name, "hub")


@pytest.mark.parametrize("path", [f"a/b@{COMMIT}", f"a/b/c.safetensors@{COMMIT}"])
def test_a_commit_never_changes(path: str) -> None:
    assert remote(path).is_pinned


def test_the_hub_may_be_a_mirror() -> None:
    settings = Settings(hf_endpoint="http://10.0.0.5:8080/hub/", hf_token=SecretStr("secret"))
    assert remote("a/b", settings).address == "http://10.0.0.5:8080/hub/api/models/a/b"
    link = remote(f"{HUB}/a/b/blob/main/c.safetensors", settings)
    assert link.address == "http://10.0.0.5:8080/hub/a/b/resolve/main/c.safetensors"
    assert token_for(link.address, settings) == "secret"
    assert token_for(f"{HUB}/a/b", settings) is None


CIVITAI = "https://civitai.com"
DOWNLOAD = "/api/download/models/5"


@pytest.mark.parametrize("host", ["https://civitai.com", "https://civitai.red"])
@pytest.mark.parametrize(
    ("path", "address", "name"),
    [
        (DOWNLOAD, DOWNLOAD, DOWNLOAD),
        (
            f"{DOWNLOAD}?type=Model&fileId=7&token=hunter2",
            f"{DOWNLOAD}?type=Model&fileId=7&token=hunter2",
            f"{DOWNLOAD}?type=Model&fileId=7",
        ),
        ("/models/3/a-name?modelVersionId=5", DOWNLOAD, DOWNLOAD),
        ("/models/3?modelVersionId=5&x=y", DOWNLOAD, DOWNLOAD),
        ("/model-versions/5", DOWNLOAD, DOWNLOAD),
    ],
)
def test_a_version_on_civitai(host: str, path: str, address: str, name: str) -> None:
    source = remote(f"{host}{path}")
    assert (source.address, source.name) == (f"{host}{address}", f"{host}{name}")
    assert source.listing is None


def test_a_model_on_civitai_is_its_newest_version() -> None:
    source = remote(f"{CIVITAI}/models/3/a-name")
    assert (source.address, source.listing) == (f"{CIVITAI}/api/v1/models/3", "civitai")
    listing = {"modelVersions": [{"id": 9}, {"id": 5}]}
    file = chosen(source, listing, Settings())
    assert file.address == f"{CIVITAI}/api/download/models/9"
    with pytest.raises(SourceError, match="no files"):
        chosen(source, {"modelVersions": []}, Settings())


def test_any_other_address_is_taken_as_it_is() -> None:
    source = remote("https://user:hunter2@host.org/a%7E.safetensors?Signature=hunter2#x")
    assert source.address == "https://user:hunter2@host.org/a%7E.safetensors?Signature=hunter2"
    assert source.name == "https://host.org/a%7E.safetensors"
    assert "hunter2" not in repr(source)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("http://host.org/a.safetensors?key=hunter2", "must begin with https://"),
        ("ftp://host.org/a.safetensors", "must begin with https://"),
        ("file:///etc/passwd", "must begin with https://"),
        ("https://]a[@/", "not an address"),
        (f"{CIVITAI}/models/3?modelVersionId=x", "modelVersionId must be a number"),
        ("/etc/passwd", "no absolute path"),
        ("../a.safetensors", "no absolute path and no .."),
        ("a/../../b/c.safetensors", "no absolute path and no .."),
        ("a.safetensors", "this worker has no LORA_DIR; send an https:// address"),
        ("a/b.safetensors", "this worker has no LORA_DIR"),
        ("a b/c", "this worker has no LORA_DIR"),
        ("a/b@main/c.safetensors", "its revision must stand at the end"),
    ],
)
def test_a_path_that_means_nothing_is_told(path: str, reason: str) -> None:
    told = refusal(path)
    assert reason in told
    assert "hunter2" not in told


# --- what a repository has ---------------------------------------------------------------------


def file_of(names: list[str], path: str = "a/b") -> str:
    siblings = [{"rfilename": name} for name in names]
    return chosen(remote(path), {"siblings": siblings}, Settings()).name


def test_a_repository_s_only_file_is_taken() -> None:
    assert file_of(["README.md", "x/y.safetensors", "y.bin"]) == "a/b/x/y.safetensors"
    assert file_of(["y.safetensors"], f"a/b@{COMMIT}") == f"a/b/y.safetensors@{COMMIT}"


def test_of_several_the_one_with_the_usual_name_is_taken() -> None:
    names = ["x.safetensors", "pytorch_lora_weights.safetensors"]
    assert file_of(names) == "a/b/pytorch_lora_weights.safetensors"


def test_several_files_are_listed_up_to_a_number() -> None:
    with pytest.raises(SourceError) as caught:
        file_of([f"{i:02}.safetensors" for i in range(25)])
    told = str(caught.value)
    assert "send org/repo/file with one of 00.safetensors, 01.safetensors" in told
    assert told.endswith("19.safetensors and 5 more")


@pytest.mark.parametrize("listing", [{}, [], {"siblings": 5}, {"siblings": [{}]}, None])
def test_a_listing_that_is_none_is_told(listing: object) -> None:
    with pytest.raises(SourceError, match="no files"):
        chosen(remote("a/b"), listing, Settings())


def test_a_repository_of_pickles_is_told() -> None:
    with pytest.raises(SourceError, match="no .safetensors file"):
        file_of(["model.bin"])


# --- LORA_DIR ----------------------------------------------------------------------------------


@pytest.fixture
def lora_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    for name in ("one.safetensors", "style/two.safetensors", "a/b/three.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (folder / "link.safetensors").symlink_to(folder / "one.safetensors")
    (folder / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "up").symlink_to(tmp_path)
    (folder / "round.safetensors").symlink_to(folder / "round.safetensors")
    return folder


@pytest.mark.parametrize("name", ["one.safetensors", "style/two.safetensors", "link.safetensors"])
def test_a_file_in_lora_dir(lora_dir: Path, name: str) -> None:
    source = find_source(name, Settings(lora_dir=lora_dir))
    assert source == LocalFile((lora_dir / name).resolve(), name)


def test_a_file_in_lora_dir_wins_over_the_hub(lora_dir: Path) -> None:
    assert isinstance(find_source("a/b/three.safetensors", Settings(lora_dir=lora_dir)), LocalFile)
    assert isinstance(find_source("a/b/four.safetensors", Settings(lora_dir=lora_dir)), RemoteFile)


@pytest.mark.parametrize(
    "name",
    [
        "out.safetensors",
        "up/secret.safetensors",
        "style/../../secret.safetensors",
        "../secret.safetensors",
        "style",
        "round.safetensors",
        "x\0.safetensors",
        "x" * 1900,
    ],
)
def test_nothing_outside_of_lora_dir_and_nothing_but_files(lora_dir: Path, name: str) -> None:
    told = refusal(name, Settings(lora_dir=lora_dir))
    assert str(lora_dir.parent) not in told


@pytest.mark.parametrize("name", ["out.safetensors", "round.safetensors"])
def test_a_link_that_is_not_followed_is_told(lora_dir: Path, name: str) -> None:
    assert "is a link that leads out of LORA_DIR" in refusal(name, Settings(lora_dir=lora_dir))


def test_an_absolute_path_is_refused_even_into_lora_dir(lora_dir: Path) -> None:
    told = refusal(str(lora_dir / "one.safetensors"), Settings(lora_dir=lora_dir))
    assert "no absolute path" in told


def test_near_matches_and_those_that_are_there_are_told(lora_dir: Path) -> None:
    told = refusal("oen.safetensors", Settings(lora_dir=lora_dir))
    assert "did you mean one.safetensors? there are" in told
    assert "a/b/three.safetensors, link.safetensors, one.safetensors, style/two.safetensors" in told
    for i in range(30):
        (lora_dir / f"n{i:02}.safetensors").touch()
    assert "and 14 more" in refusal("oen.safetensors", Settings(lora_dir=lora_dir))


# --- tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "token"),
    [
        (f"{HUB}/a/b/resolve/main/c", "hub"),
        ("https://HUGGINGFACE.co:443/a", "hub"),
        ("http://huggingface.co/a", None),
        ("https://huggingface.co:8443/a", None),
        ("https://cdn-lfs.huggingface.co/a", None),
        ("https://huggingface.co.evil.org/a", None),
        ("https://huggingface.co@evil.org/a", None),
        (f"{CIVITAI}{DOWNLOAD}", "civitai"),
        (f"https://civitai.red{DOWNLOAD}", "civitai"),
        (f"https://civitai.green{DOWNLOAD}", "civitai"),
        (f"{CIVITAI}{DOWNLOAD}?token=of-the-caller", None),
        ("https://civitai.com.evil.org/a", None),
        ("http://civitai.com/a", None),
        ("https://host.org/a", None),
    ],
)
def test_a_token_goes_to_its_own_host_only(address: str, token: str | None) -> None:
    settings = Settings(hf_token=SecretStr("hub"), civitai_token=SecretStr("civitai"))
    assert token_for(address, settings) == token
    assert token_for(address, Settings()) is None
