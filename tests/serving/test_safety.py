"""What `SAFETY_CHECKER` does to jobs."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import handler
from sdxl_worker import gpu
from sdxl_worker.errors import ModelError
from sdxl_worker.loading.safety_checkers import SafetyChecker, SafetyCheckerFiles, processor_of
from sdxl_worker.serving import start as start_module
from sdxl_worker.serving.answering import Outcome, answer
from sdxl_worker.serving.start import put_beside, start
from sdxl_worker.settings import Settings
from tests.loading.transformers_networks import save_classifier
from tests.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY, S3Server
from tests.serving.conftest import Platform
from tests.support import PROMPT, REPOSITORY, data_uri, decoded, error, noise_picture, run

QUICK: dict[str, Any] = {
    "prompt": PROMPT,
    "seed": 1,
    "num_inference_steps": 2,
    "refiner_inference_steps": 0,
    "height": 64,
    "width": 64,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers that find `normal`, or `nsfw`, in every picture."""
    folder = tmp_path_factory.mktemp("classifiers")
    for likeliest in ("normal", "nsfw"):
        save_classifier(folder / likeliest, likeliest=likeliest)
    return folder


@pytest.fixture
def flagging(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything."""
    monkeypatch.setenv("SAFETY_CHECKER", str(folders / "nsfw"))


@pytest.fixture
def blanking(flagging: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("SAFETY_BLANK", "true")


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The answer of a worker without a checker."""
    return run({**QUICK, "num_images": 2})


@pytest.mark.parametrize("likeliest", ["normal", "nsfw"])
def test_each_picture_is_told_of_and_sent_as_it_is(
    likeliest: str, plain: dict[str, Any], folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFETY_CHECKER", str(folders / likeliest))
    output = run({**QUICK, "num_images": 2})
    assert output.pop("nsfw") == [likeliest == "nsfw"] * 2
    assert output == plain


def test_without_a_checker_nothing_is_told(plain: dict[str, Any]) -> None:
    assert "nsfw" not in plain


@pytest.mark.usefixtures("blanking")
def test_flagged_pictures_become_black_where_the_owner_says_so() -> None:
    output = run({**QUICK, "num_images": 2})
    assert output["nsfw"] == [True, True]
    for uri in [*output["images"], output["image_url"]]:
        picture = decoded(uri)
        assert picture.size == (64, 64)
        assert picture.getcolors() == [(64 * 64, (0, 0, 0))]
    assert output["warning"].startswith("nsfw: 2 of 2 pictures flagged")


@pytest.mark.usefixtures("blanking")
def test_a_picture_is_judged_as_it_is_sent_and_so_is_what_it_is_put_back_into() -> None:
    """What is outside of the mask is the caller's own."""
    picture = noise_picture(96, 64)
    mask = noise_picture(96, 64).point(lambda _: 0)
    mask.paste("white", (8, 8, 40, 40))
    fields = {"image_url": data_uri(picture), "mask_url": data_uri(mask)}
    output = run({**QUICK, "height": 64, "width": 96, **fields})
    assert decoded(output["images"][0]).getcolors() == [(96 * 64, (0, 0, 0))]


@pytest.mark.usefixtures("_others_pictures")
def test_only_those_that_are_flagged_become_black(plain: dict[str, Any]) -> None:
    output = run({**QUICK, "num_images": 2})
    assert output["nsfw"] == [False, True]
    assert output["images"][0] == plain["images"][0]
    assert decoded(output["images"][1]).getbbox() is None


@pytest.fixture
def _others_pictures(blanking: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    def flags(_: Any, pixels: Any, *__: Any) -> list[bool]:
        return [i == 1 for i in range(len(pixels))]

    monkeypatch.setattr(SafetyChecker, "flags", flags)


@pytest.mark.usefixtures("blanking")
def test_what_is_uploaded_is_black_too(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("BUCKET_NAME", "pics")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", ACCESS_KEY_ID)
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY)
    output = run(QUICK)
    assert output["images"][0].startswith("http")
    assert output["nsfw"] == [True]
    [stored] = (s3.folder / "pics" / "test").iterdir()
    assert Image.open(stored).getbbox() is None


@pytest.mark.usefixtures("blanking")
def test_openai_s_answers_are_judged_as_well() -> None:
    fields = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 2, "quality": "low"}
    job_input = {"openai_route": "/v1/images/generations", "openai_input": fields}
    output = asyncio.run(handler.handler({"id": "test", "input": job_input}))
    assert output["nsfw"] == [True]
    png = "data:image/png;base64," + output["data"][0]["b64_json"]
    assert decoded(png).getbbox() is None


@pytest.mark.usefixtures("flagging")
def test_pictures_are_made_small_beside_the_gpu_thread_where_others_are_drawn(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, int] = {}

    def note(kind: type, method: str) -> None:
        original: Callable[..., Any] = getattr(kind, method)

        def noting(*arguments: Any, **options: Any) -> Any:
            threads[method] = threading.get_ident()
            return original(*arguments, **options)

        monkeypatch.setattr(kind, method, noting)

    note(type(processor_of(folders / "nsfw")), "preprocess")
    note(SafetyChecker, "flags")
    run(QUICK)
    assert threads["preprocess"] != threads["flags"]


@pytest.mark.usefixtures("flagging")
def test_what_cannot_be_prepared_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("a shape")

    monkeypatch.setattr(SafetyCheckerFiles, "prepared", fail)
    assert error(QUICK).startswith("the worker's safety checker failed at the pictures, so they")


@pytest.mark.parametrize("blank", ["true", "false"])
@pytest.mark.usefixtures("flagging")
def test_previews_would_show_what_is_to_become_black(
    blank: str, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFETY_BLANK", blank)
    run({**QUICK, "preview": True})
    shown = ["preview" in body["output"] for _, _, body in platform.updates]
    assert shown
    assert all(shown) == any(shown) == (blank == "false")


@pytest.mark.usefixtures("flagging")
def test_what_cannot_be_judged_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a shape")

    monkeypatch.setattr(SafetyChecker, "flags", fail)
    assert error(QUICK).startswith("the worker's safety checker failed at the pictures, so they")


@pytest.mark.usefixtures("flagging")
def test_a_gpu_that_breaks_while_it_judges_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(SafetyChecker, "flags", fail)
    monkeypatch.setattr(gpu, "is_broken", lambda: True)
    answered = asyncio.run(answer({"id": "test", "input": QUICK}))
    assert answered.outcome == Outcome.GPU_BROKEN
    assert answered.output["refresh_worker"] is True


@pytest.mark.usefixtures("flagging")
def test_numbers_that_are_not_finite_are_no_judgement() -> None:
    models, folder = start(Settings()).result(), Settings().safety_checker
    assert folder is not None
    checker: Any = put_beside(models, [SafetyCheckerFiles(folder)])[0]
    bias = checker.network.classifier.bias
    kept = bias.clone()
    try:
        bias.fill_(float("nan"))
        answered = asyncio.run(answer({"id": "test", "input": QUICK}))
    finally:
        bias.copy_(kept)
    assert answered.outcome == Outcome.NO_PICTURE
    assert list(answered.output) == ["error"]
    assert run(QUICK)["nsfw"] == [True], "the next job is judged again"


@pytest.mark.usefixtures("flagging")
def test_one_that_had_to_go_for_others_is_loaded_again() -> None:
    run(QUICK)
    start_module._kept._drop(Settings().safety_checker)
    assert run(QUICK)["nsfw"] == [True]


@pytest.mark.usefixtures("flagging")
def test_a_check_tells_whether_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run({"check": True})["safety_checker"] is True
    monkeypatch.delenv("SAFETY_CHECKER")
    assert run({"check": True})["safety_checker"] is False


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("nowhere", "SAFETY_CHECKER: .*nowhere must be a folder"),
        ("empty", "SAFETY_CHECKER: .*empty must be a folder in transformers layout"),
        ("animals", "SAFETY_CHECKER: .* it has cat, dog"),
    ],
)
def test_a_worker_without_its_checker_does_not_start(
    folder: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not load the models first, which takes minutes."""
    (tmp_path / "empty").mkdir()
    save_classifier(tmp_path / "animals", ["cat", "dog"], likeliest="cat")
    monkeypatch.setattr(start_module, "_load_and_draw", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=told):
        start(Settings(safety_checker=tmp_path / folder)).result()


def test_an_owner_who_wants_blanks_has_to_have_a_checker() -> None:
    with pytest.raises(ModelError, match="^SAFETY_BLANK: needs SAFETY_CHECKER"):
        start(Settings(safety_blank=True)).result()


def test_a_worker_without_one_imports_nothing_for_it() -> None:
    script = (
        "import sys\n"
        "from sdxl_worker.serving.start import start\n"
        "from sdxl_worker.settings import Settings\n"
        "start(Settings()).result()\n"
        "names = ('transformers.models.vit', 'sdxl_worker.loading.safety_checkers', 'cv2',\n"
        "    'onnxruntime', 'rtmlib')\n"
        "sys.exit(', '.join(name for name in names if name in sys.modules) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
