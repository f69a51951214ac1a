"""The settings, and what a wrong one is answered with."""

import pytest

from sdxl_worker.errors import ModelError
from sdxl_worker.settings import Settings, load_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DTYPE", "int8"),
        ("DTYPE", "FLOAT16 "),
        ("METADATA", "perhaps"),
        ("DEFAULT_OUTPUT_FORMAT", "jpg"),
        ("WORKER_CONCURRENCY", "0"),
        ("WORKER_CONCURRENCY", "9"),
        ("WORKER_CONCURRENCY", "two"),
        ("STEP_CACHE", "1"),
        ("STEP_CACHE", "6"),
        ("MAX_STEPS", "0"),
        ("MAX_STEPS", "1001"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=f"wrong environment variable: {name}: .*{value}"):
        load_settings()


@pytest.mark.parametrize(
    "name",
    [
        "MODEL_DIR",
        "DTYPE",
        "STEP_CACHE",
        "METADATA",
        "PNG_METADATA",
        "WORKER_CONCURRENCY",
        "MAX_STEPS",
    ],
)
def test_an_empty_setting_is_unset_as_the_hub_sends_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "")
    assert load_settings() == Settings()


def test_wrong_settings_are_told_in_the_words_of_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORKER_CONCURRENCY", "two")
    monkeypatch.setenv("QUANTIZE", "int4")
    with pytest.raises(ModelError) as caught:
        load_settings()
    assert str(caught.value) == (
        "wrong environment variable: "
        'QUANTIZE: must be one of int8, fp8; got "int4" (did you mean int8?); '
        'WORKER_CONCURRENCY: must be an integer from 1 to 8; got "two"'
    )


def test_the_old_name_of_the_metadata_s_setting_is_told_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PNG_METADATA", "perhaps")
    with pytest.raises(ModelError) as caught:
        load_settings()
    assert str(caught.value) == (
        "wrong environment variable: METADATA: must be one of all, no_prompts, none (or true or "
        'false, as PNG_METADATA); got "perhaps"'
    )
