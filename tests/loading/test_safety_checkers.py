"""The classifier of `SAFETY_CHECKER`: what is one, and what it flags."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_worker.errors import ModelError
from sdxl_worker.loading.safety_checkers import SafetyChecker, SafetyCheckerFiles
from sdxl_worker.loading.safety_labels import check_safety_checker, is_flagged
from sdxl_worker.placement import Placement
from tests.loading.transformers_networks import save_classifier
from tests.support import REPOSITORY

CPU = Placement(torch.device("cpu"), torch.float16, resident=True)
WHITE, BLACK = Image.new("RGB", (80, 40), "white"), Image.new("RGB", (40, 80))


def loaded(folder: Path) -> SafetyChecker:
    checker = SafetyCheckerFiles(folder).load(CPU)
    assert isinstance(checker, SafetyChecker)
    return checker


def flags(folder: Path, pictures: list[Image.Image]) -> list[bool]:
    return loaded(folder).flags(SafetyCheckerFiles(folder).prepared(pictures))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError, match=r"^SAFETY_CHECKER: ") as caught:
        loaded(folder)
    return str(caught.value)


def early_refusal(folder: Path) -> str:
    """What is told before anything is loaded."""
    with pytest.raises(ModelError, match=r"^SAFETY_CHECKER: ") as caught:
        check_safety_checker(folder)
    return str(caught.value)


def test_each_picture_is_judged_by_itself_in_batches(tmp_path: Path) -> None:
    save_classifier(tmp_path, flags_bright=True)
    pixels = SafetyCheckerFiles(tmp_path).prepared([WHITE, BLACK, BLACK, WHITE, BLACK, WHITE])
    checked: list[int] = []
    flagged = loaded(tmp_path).flags(pixels, lambda: checked.append(1))
    assert flagged == [True, False, False, True, False, True]
    assert len(checked) == 2


def test_a_job_that_is_stopped_prepares_no_further_picture(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    seen: list[int] = []

    def check() -> None:
        seen.append(1)
        if len(seen) == 2:
            raise KeyError

    with pytest.raises(KeyError):
        SafetyCheckerFiles(tmp_path).prepared([WHITE] * 3, check)


@pytest.mark.parametrize(
    ("likeliest", "expected"),
    [("drawings", False), ("hentai", True), ("neutral", False), ("porn", True)],
)
def test_a_picture_is_flagged_whose_likeliest_label_says_so(
    likeliest: str, expected: bool, tmp_path: Path
) -> None:
    save_classifier(tmp_path, ["drawings", "hentai", "neutral", "porn"], likeliest=likeliest)
    assert flags(tmp_path, [WHITE]) == [expected]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("NSFW", True),
        ("Unsafe content", True),
        ("sexually_explicit", True),
        ("sexy", True),
        ("normal", False),
        ("sfw", False),
        ("safe", False),
        ("not_nsfw", False),
        ("non-explicit", False),
    ],
)
def test_labels_are_understood_however_they_are_written(label: str, expected: bool) -> None:
    assert is_flagged(label) == expected


def test_a_classifier_of_something_else_is_refused_with_its_labels(tmp_path: Path) -> None:
    save_classifier(tmp_path, ["cat", "dog"], likeliest="cat")
    assert refusal(tmp_path).endswith("it has cat, dog")
    assert early_refusal(tmp_path) == refusal(tmp_path)


def test_a_classifier_that_would_flag_everything_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, ["nsfw", "porn"], likeliest="nsfw")
    assert "and others that do not" in refusal(tmp_path)
    assert early_refusal(tmp_path) == refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read: "),
        ("[]", "is no JSON object"),
        ("{}", "it has none (id2label in its config.json)"),
        ('{"id2label": ["nsfw", "normal"]}', "it has none (id2label in its config.json)"),
    ],
)
def test_a_configuration_that_tells_no_labels_is_refused_without_loading(
    text: str, problem: str, tmp_path: Path
) -> None:
    save_classifier(tmp_path)
    check_safety_checker(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert problem in early_refusal(tmp_path)


def test_labels_that_transformers_makes_itself_are_looked_at_when_it_is_loaded(
    tmp_path: Path,
) -> None:
    save_classifier(tmp_path)
    config = {"architecture": "vit_tiny", "pretrained_cfg": {}, "label_names": ["sfw", "nsfw"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_safety_checker(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_config_or_weights_is_refused(missing: str, tmp_path: Path) -> None:
    save_classifier(tmp_path)
    (tmp_path / missing).unlink()
    assert "must be a folder in transformers layout" in refusal(tmp_path)
    assert early_refusal(tmp_path) == refusal(tmp_path)


def test_weights_that_were_not_fetched_are_refused_without_loading(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "model.safetensors cannot be read: a Git LFS pointer" in early_refusal(tmp_path)


def test_weights_that_lack_a_part_are_refused_and_not_made_up(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["classifier.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert refusal(tmp_path).endswith(
        "lack 1 of what config.json tells of, classifier.weight among them"
    )


def test_code_that_comes_with_weights_is_not_run(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    names = {"AutoConfig": "own.Own", "AutoModelForImageClassification": "own.Own"}
    path.write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    (tmp_path / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path)!r}, 'run').touch()"
    )
    refusal(tmp_path)
    assert not (tmp_path / "run").exists()


def test_without_a_preprocessor_s_configuration_it_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in refusal(tmp_path)


def test_its_size_is_told_without_loading_it(tmp_path: Path) -> None:
    """Judged in float32, whatever the models are in."""
    save_classifier(tmp_path)
    numbers = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert SafetyCheckerFiles(tmp_path).size_bytes(torch.float16) == 4 * numbers
    assert {one.dtype for one in loaded(tmp_path).parameters()} == {torch.float32}


def test_numbers_that_are_not_finite_are_no_judgement(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    checker = loaded(tmp_path)
    torch.nn.init.constant_(next(checker.parameters()), float("nan"))
    with pytest.raises(ArithmeticError):
        checker.flags(SafetyCheckerFiles(tmp_path).prepared([WHITE]))


def test_it_needs_no_torchvision_and_says_nothing(tmp_path: Path) -> None:
    """In a process where torchvision is not there, whether it is installed or not."""
    save_classifier(tmp_path)
    script = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import pathlib, torch\n"
        "from sdxl_worker.loading.sparing_imports import sparing_imports\n"
        "with sparing_imports(): from transformers import CLIPTextModel\n"
        "from transformers.utils import logging\n"
        "logging.set_verbosity_error(); logging.disable_progress_bar()\n"
        "from PIL import Image\n"
        "from sdxl_worker.loading.safety_checkers import SafetyCheckerFiles\n"
        "from sdxl_worker.placement import Placement\n"
        "files = SafetyCheckerFiles(pathlib.Path(sys.argv[1]))\n"
        "checker = files.load(Placement(torch.device('cpu'), torch.float32, True))\n"
        "pixels = files.prepared([Image.new('RGB', (40, 40))])\n"
        "assert checker.flags(pixels) == [False]\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
