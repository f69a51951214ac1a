"""The Hub's files: what the platform accepts, and what the worker is."""

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from PIL import Image

from sdxl_worker.placement import WORKING_MEMORY_BYTES, fits
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings, load_settings
from tests.support import REPOSITORY, run
from tools import hub


def _json(path: str) -> Any:
    return json.loads((REPOSITORY / path).read_text(encoding="utf-8"))


HUB = _json(".runpod/hub.json")
TESTS = _json(".runpod/tests.json")
CONFIG = HUB["config"]
INPUTS = {variable["key"]: variable["input"] for variable in CONFIG["env"]}
POOLS = {pool.name: pool for pool in hub.POOLS}


def _validate(document: Any, name: str) -> None:
    schema = _json(f"tests/schemas/{name}.schema.json")
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)


def test_both_files_are_as_the_publishing_guide_has_them() -> None:
    _validate(HUB, "hub")
    _validate(TESTS, "tests")


def _unset(*path: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hub", _unset("title")),
        ("hub", _unset("config", "gpuIds")),
        ("hub", _unset("config", "env", 0, "input", "name")),
        ("hub", _set("category", to="picture")),
        ("hub", _set("config", "idleTimeout", to=5)),
        ("hub", _set("config", "containerDiskInGb", to="20")),
        ("hub", _set("config", "gpuIds", to="RTX 4090")),
        ("hub", _set("config", "allowedCudaVersions", to=[13.0])),
        ("hub", _set("config", "presets", 0, "defaults", to=[])),
        ("hub", _set("config", "env", 0, "value", to="both value and input")),
        ("hub", _set("config", "env", 0, "input", "min", to=1)),
        ("hub", _set("config", "env", 0, "input", "default", to=None)),
        ("tests", _unset("tests", 0, "input")),
        ("tests", _set("tests", to=[])),
        ("tests", _set("tests", 0, "timeout", to="300000")),
        ("tests", _set("tests", 0, "expected", to={})),
        ("tests", _set("config", "env", to={"DTYPE": "float16"})),
        ("tests", _unset("config", "gpuTypeId")),
    ],
)
def test_the_schemas_refuse_what_the_publishing_guide_does_not_have(
    name: str, change: Callable[[Any], None]
) -> None:
    document = copy.deepcopy({"hub": HUB, "tests": TESTS}[name])
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        _validate(document, name)


def test_every_setting_has_a_field_in_the_form_that_says_the_same() -> None:
    assert set(INPUTS) == {name.upper() for name in Settings.model_fields} | {"RUNPOD_LOG_LEVEL"}
    for name, setting in Settings.model_fields.items():
        field = INPUTS[name.upper()]
        assert field["description"] == str(setting.description).replace("`", "")
        assert field.get("default") in (setting.default, "" if "options" in field else None)


def test_what_the_form_sends_is_accepted_and_is_the_default_when_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, field in INPUTS.items():
        if "default" in field:
            monkeypatch.setenv(key, _sent(field["default"]))
    assert load_settings() == Settings.model_construct()
    for key, field in INPUTS.items():
        allowed = [option["value"] for option in field.get("options", [])]
        allowed += [str(field[bound]) for bound in ("min", "max") if bound in field]
        allowed += [field[side] for side in ("trueValue", "falseValue") if side in field]
        for value in allowed:
            monkeypatch.setenv(key, value)
            load_settings()


def _sent(value: Any) -> str:
    """A value of the form as the container gets it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_presets_are_settings_with_values_that_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for preset in CONFIG["presets"]:
        for key, value in preset["defaults"].items():
            assert key in INPUTS
            assert value != INPUTS[key]["default"], f"{preset['name']}: {key} changes nothing"
            monkeypatch.setenv(key, _sent(value))
        load_settings()


def test_a_text_that_is_not_filled_in_does_not_undo_what_the_image_sets() -> None:
    # The Hub sends a default of "" as an empty variable, which hides the image's own.
    assert "default" not in INPUTS["MODEL_DIR"]
    assert not INPUTS["MODEL_DIR"].get("required")


def test_the_sdk_gets_a_log_level_that_it_accepts() -> None:
    # With RUNPOD_LOG_LEVEL="" the SDK cannot even be imported.
    from runpod.serverless.modules.rp_logger import LOG_LEVELS

    levels = [option["value"] for option in INPUTS["RUNPOD_LOG_LEVEL"]["options"]]
    assert INPUTS["RUNPOD_LOG_LEVEL"]["default"] in levels
    assert set(levels) <= set(LOG_LEVELS)


def test_the_weights_stay_on_every_card_of_the_pools_in_the_listing() -> None:
    for name in CONFIG["gpuIds"].split(","):
        pool = POOLS[name]
        assert fits(hub.WEIGHTS_BYTES, pool.smallest_gb * hub.GB), name


def test_cards_of_16_gb_offload_and_have_room_for_the_largest_network() -> None:
    assert not hub.is_resident(16)
    assert hub.is_resident(20)
    base_unet_bytes = 2 * 2_567_463_684
    assert base_unet_bytes + WORKING_MEMORY_BYTES < 16 * hub.GB


def test_the_guide_to_cards_tells_pools_that_are_mixed_by_the_size() -> None:
    table = hub.gpu_table()
    assert "16 GB: offloaded, 20 GB: resident" in table
    assert "| `ADA_24` | RTX 4090 24 | resident |" in table


def test_the_cuda_versions_start_at_that_of_torch_and_go_on_from_there() -> None:
    # The torch of requirements.txt is built for CUDA 13.0 on PyPI: drivers from 13.0 on run it.
    assert "torch==2.13.0" in (REPOSITORY / "requirements.txt").read_text()
    versions = CONFIG["allowedCudaVersions"]
    assert versions[0] == "13.0"
    assert versions == [f"13.{minor}" for minor in range(len(versions))]
    assert TESTS["config"]["allowedCudaVersions"] == versions


def test_the_icon_is_a_square_picture_of_this_repository() -> None:
    name = re.fullmatch(
        r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/main/(.+)", HUB["iconUrl"]
    )
    assert name is not None
    with Image.open(REPOSITORY / name[1]) as icon:
        assert icon.width == icon.height >= 100


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_a_test_of_the_hub_draws_and_answers_in_under_2_kb(test: dict[str, Any]) -> None:
    small = {"height": 64, "width": 64} if "prompt" in test["input"] else {}
    report = run(test["input"] | small)
    assert report["steps"] >= 3
    assert len(report["sha256"]) == 1
    assert len(json.dumps(report)) < 2000
    assert test["timeout"] >= 300_000


def test_the_full_test_of_the_hub_is_a_default_request_of_native_size() -> None:
    _, full = TESTS["tests"]
    request = parse_request(full["input"])
    assert (request.width, request.height, request.num_images) == (1024, 1024, 1)
    assert (request.num_inference_steps, request.refiner_inference_steps) == (25, 50)


def test_the_hub_tests_on_a_card_of_the_listing() -> None:
    card = TESTS["config"]["gpuTypeId"].removeprefix("NVIDIA GeForce ")
    listed = [POOLS[name] for name in CONFIG["gpuIds"].split(",")]
    assert any(card in pool.cards for pool in listed)
