"""What a caller is told of an input that breaks its rules."""

import pytest

from sdxl_worker.request import (
    Request,
)
from sdxl_worker.wording import field_schemas, rule, without_secrets


def test_the_bounds_are_told_in_words() -> None:
    fields = field_schemas(Request)
    assert rule(fields["height"]) == "an integer from 64 to 2048, a multiple of 8"
    assert rule(fields["high_noise_frac"]) == "a number above 0 and below 1"
    assert rule(fields["seed"]) == "an integer from -1 to 9007199254740991"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://user:pw@example.com:8000/a/b.png?key=1#x", "https://example.com:8000/a/b.png"),
        ("https://example.com?key=1", "https://example.com"),
        ("https://example.com/#key", "https://example.com/"),
        ("ftp://[bad?key=1", "ftp://[bad"),
    ],
)
def test_addresses_are_told_without_their_secrets(url: str, told: str) -> None:
    assert without_secrets(url) == told
