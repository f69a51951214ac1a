"""The settings, and what a wrong one is answered with."""

import re

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
        ("BATCH_JOBS", "0"),
        ("BATCH_JOBS", "17"),
        ("STEP_CACHE", "1"),
        ("STEP_CACHE", "6"),
        ("MAX_STEPS", "0"),
        ("MAX_STEPS", "1001"),
        ("SERVE_HTTP", "perhaps"),
        ("PORT", "0"),
        ("PORT", "tcp://10.0.0.1:80"),
        ("PORT_HEALTH", "65536"),
        ("QUEUE_LIMIT", "-1"),
        ("QUEUE_LIMIT", "1001"),
        ("BUCKET_ENDPOINT_URL", "bucket.example"),
        ("BUCKET_ENDPOINT_URL", "http://["),
        ("BUCKET_ENDPOINT_URL", "http://a:b:c"),
        ("BUCKET_PUBLIC_URL", "ftp://cdn.example"),
        ("BUCKET_URL_EXPIRY_SECONDS", "0"),
        ("BUCKET_URL_EXPIRY_SECONDS", "604801"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ModelError, match=f"wrong environment variable: {name}: .*{re.escape(value)}"
    ):
        load_settings()


def test_a_worker_takes_as_many_jobs_as_it_draws_side_by_side() -> None:
    assert Settings().jobs_at_once == 1
    assert Settings(worker_concurrency=3).jobs_at_once == 3
    assert Settings(batch_jobs=16).jobs_at_once == 16
    assert Settings(batch_jobs=2, worker_concurrency=3).jobs_at_once == 3


@pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields])
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


def test_http_is_served_at_the_platform_s_port_there_and_at_8000_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Settings().http_port == 8000
    assert Settings(port=81).http_port == 81
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "e1")
    assert Settings().http_port == 80
    assert Settings(port=8000).http_port == 8000


@pytest.mark.parametrize("value", ["hunter2 3", "hunter2,", ",", "hunter2,,b", "h\u00fcnter2"])
def test_keys_that_no_header_can_hold_are_refused_and_not_shown(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", value)
    with pytest.raises(ModelError, match="API_KEY: must be a key, or several with") as caught:
        load_settings()
    assert "nter2" not in str(caught.value)


def test_several_keys_are_told_apart_and_none_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().api_keys == []
    monkeypatch.setenv("API_KEY", "hunter2, hunter3")
    settings = load_settings()
    assert settings.api_keys == ["hunter2", "hunter3"]
    assert "hunter" not in repr(settings)


STORAGE = {
    "BUCKET_ENDPOINT_URL": "https://user:hunter2@s3.example",
    "BUCKET_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "BUCKET_SECRET_ACCESS_KEY": "hunter2",
}


@pytest.mark.parametrize("missing", STORAGE)
def test_half_a_storage_is_refused_with_the_name_of_what_is_missing(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in STORAGE.items():
        monkeypatch.setenv(name, "" if name == missing else value.replace("user:hunter2@", ""))
    with pytest.raises(ModelError, match=f"{missing}: required beside BUCKET_") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["NAME", "REGION", "PREFIX", "PUBLIC_URL"])
def test_a_setting_of_storage_alone_names_all_that_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"BUCKET_{name}", "https://cdn.example")
    with pytest.raises(ModelError) as caught:
        load_settings()
    for missing in STORAGE:
        assert f"{missing}: required beside BUCKET_{name}" in str(caught.value)


def test_an_expiry_alone_sets_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_URL_EXPIRY_SECONDS", "60")
    assert load_settings().bucket_endpoint_url is None


def test_no_secret_of_the_storage_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STORAGE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match="BUCKET_ENDPOINT_URL: must be an http://") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "https://s3.example")
    settings = load_settings()
    assert "hunter2" not in repr(settings)
    assert settings.bucket_secret_access_key is not None
    assert settings.bucket_secret_access_key.get_secret_value() == "hunter2"
    assert hash(settings) == hash(load_settings())
