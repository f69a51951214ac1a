"""What a caller is told of an input that breaks its rules."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from sdxl_worker.input_model import InputModel
from sdxl_worker.request import Request
from sdxl_worker.wording import (
    MAX_PROBLEMS_TOLD,
    MAX_SHOWN_CHARACTERS,
    field_schemas,
    problems,
    rule,
    shown,
    without_secrets,
)


def test_the_bounds_are_told_in_words() -> None:
    fields = field_schemas(Request)
    assert rule(fields["height"]) == "an integer from 64 to 4096, a multiple of 8"
    assert rule(fields["strength"]) == "a number from 0 to 1"
    assert rule(fields["seed"]) == "an integer from -1 to 18446744073709551615"


def test_a_field_s_own_description_is_told_not_that_of_its_kind_of_object() -> None:
    fields = field_schemas(Request)
    assert fields["hires"]["description"] == Request.model_fields["hires"].description
    assert fields["hires"]["default"] is None


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


class Lora(InputModel):
    path: Annotated[str, Field(min_length=2)]
    scale: Annotated[float, Field(ge=-5, le=5)] = 1.0
    kind: Literal["lora", "dora"] = "lora"

    @classmethod
    def broken_ties(cls, given: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
        if given.get("kind") == "dora" and "scale" not in given:
            yield "scale", "required for kind dora; got nothing"


class Picture(InputModel):
    loras: Annotated[list[Lora | Annotated[str, Field(max_length=9)]], Field(max_length=3)] = Field(
        default=[]
    )
    first: Lora | None = None
    sizes: list[int] | int | None = None


def told(**given: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Picture.model_validate(given)
    return problems(caught.value, Picture)


PATH = "a string of at least 2 characters"
LORA = "an object with path, scale, kind"


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        # Objects
        (
            {"first": {"path": "aa", "scale": 7}},
            ["first.scale: must be a number from -5 to 5; got 7"],
        ),
        ({"first": {}}, [f"first.path: required, {PATH}; got nothing"]),
        (
            {"first": {"path": None}},
            [f"first.path: required, {PATH}; got nothing"],
        ),
        ({"first": 3}, [f"first: must be {LORA}; got 3"]),
        (
            {"first": {"path": "aa", "weight": 1}},
            ["first.weight: no such field; the fields are path, scale, kind"],
        ),
        (
            {"first": {"path": "aa", "Scale": 1}},
            ["first.Scale: no such field (did you mean scale?); the fields are path, scale, kind"],
        ),
        (
            {"first": {"path": "aa", "kind": "Dora"}},
            ['first.kind: must be one of lora, dora; got "Dora" (did you mean dora?)'],
        ),
        # Lists
        (
            {"loras": [{"path": "aa"}, {"path": "bb", "scale": "1"}]},
            ['loras[1].scale: must be a number from -5 to 5; got "1"'],
        ),
        (
            {"loras": ["a"] * 4},
            [
                f"loras: must be a list of at most 3, each {LORA} or a string of at most 9 "
                "characters; got a list of 4"
            ],
        ),
        # Unions: an object is judged as an object, a list as a list
        (
            {"loras": [{}]},
            [f"loras[0].path: required, {PATH}; got nothing"],
        ),
        ({"loras": [3]}, [f"loras[0]: must be {LORA} or a string of at most 9 characters; got 3"]),
        (
            {"loras": ["far too long"]},
            [f'loras[0]: must be {LORA} or a string of at most 9 characters; got "far too long"'],
        ),
        ({"sizes": [1, "a"]}, ['sizes[1]: must be an integer; got "a"']),
        ({"sizes": "a"}, ['sizes: must be a list, each an integer or an integer; got "a"']),
        # Ties between fields, within an object and beside its other problems
        (
            {"loras": [{"kind": "dora"}]},
            [
                "loras[0].scale: required for kind dora; got nothing",
                f"loras[0].path: required, {PATH}; got nothing",
            ],
        ),
        # All at once, unknown fields first
        (
            {"first": {"path": "aa", "scale": 9}, "second": 1, "loras": [3, {"path": "", "x": 1}]},
            [
                "loras[1].x: no such field; the fields are path, scale, kind",
                '"second": no such field; the fields are loras, first, sizes',
                f"loras[0]: must be {LORA} or a string of at most 9 characters; got 3",
                'loras[1].path: must be a string of at least 2 characters; got ""',
                "first.scale: must be a number from -5 to 5; got 9",
            ],
        ),
    ],
)
def test_problems_are_told_by_path(given: dict[str, Any], lines: list[str]) -> None:
    assert told(**given) == lines


@pytest.mark.parametrize(
    "value",
    [
        "cdn.example.com/a.png?sig=hunter2",
        "a.png?sig=hunter2",
        "//user:hunter2@h/a",
        "user:hunter2@h",
        "http:/u:hunter2@h/a",
        "ftp://a/b https://u:hunter2@h/x",
        "http://a/http://u:hunter2@h/x",
        "http://u:hunter2@a/http://h/x",
        "http://a/?u=http://h/hunter2",
        "see\thttp://h/#hunter2",
        "?token=hunter2",
        "u:hunter2@h://x",
        ["/a?hunter2"],
        {"/a?hunter2": 1},
    ],
)
def test_no_secret_is_told_of_what_may_be_an_address(value: object) -> None:
    assert "hunter2" not in shown(value)


def test_no_secret_of_an_address_is_told_from_inside_a_value() -> None:
    [line] = told(sizes={"path": ["https://user:pw@example.com/a?token=1"]})
    assert line.endswith('got {"path": ["https://example.com/a"]}')


class Canny(InputModel):
    kind: Literal["canny"]
    low: Annotated[int, Field(ge=0)] = 1


class Depth(InputModel):
    kind: Literal["depth"]
    high: Annotated[float, Field(gt=0, le=2)] = 1.0


class Odd(InputModel):
    """Rules that no field has today."""

    told_apart: Annotated[Canny | Depth, Field(discriminator="kind")] | None = None
    either: Canny | Depth | None = None
    pair: tuple[int, int] | None = None
    named: dict[str, int] | None = None
    at_most: Annotated[int, Field(le=5)] | None = None
    above: Annotated[float, Field(gt=0)] | None = None
    half_open: Annotated[float, Field(ge=0, lt=2)] | None = None


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (
            {"told_apart": {"kind": "canny", "low": -1}},
            ["told_apart.low: must be an integer of at least 0; got -1"],
        ),
        (
            {"told_apart": {"kind": "depth", "high": 3}},
            ["told_apart.high: must be a number above 0 and of at most 2; got 3"],
        ),
        (
            {"either": {"kind": "depth", "high": 0}},
            ["either.high: must be a number above 0 and of at most 2; got 0"],
        ),
        ({"at_most": 9}, ["at_most: must be an integer of at most 5; got 9"]),
        ({"above": 0}, ["above: must be a number above 0; got 0"]),
        ({"half_open": 2}, ["half_open: must be a number of at least 0 and below 2; got 2"]),
        ({"named": {"a": "b"}}, ['named.a: must be an integer; got "b"']),
    ],
)
def test_rules_of_other_kinds_have_their_words(given: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Odd.model_validate(given)
    assert lines[0] in problems(caught.value, Odd)


@pytest.mark.parametrize(
    "given",
    [
        {"told_apart": {"kind": "pose"}},
        {"told_apart": 3},
        {"either": 3},
        {"either": {}},
        {"pair": [1, "a"]},
        {"pair": 3},
        {"named": 3},
    ],
)
def test_every_rule_can_be_told(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Odd.model_validate(given)
    lines = problems(caught.value, Odd)
    assert lines
    assert all(line.startswith(next(iter(given))) for line in lines)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("name", "shown_as"),
    [
        ("https://user:pw@example.com/a.png?token=SECRET", '"https://example.com/a.png"'),
        ("a.b\nprompt: fine", '"a.b\\nprompt: fine"'),
        ("x" * 100_000, '"a string of 100000 characters"'),
        ("a.b", '"a.b"'),
    ],
)
def test_a_name_that_is_no_field_is_told_as_any_other_value(
    name: str, shown_as: str, nested: bool
) -> None:
    given: dict[str, Any] = {"first": {"path": "aa", name: 1}} if nested else {name: 1}
    [line] = told(**given)
    place = "first." * nested
    assert line.startswith(f"{place}{shown_as}: no such field")


def test_a_value_of_any_depth_is_refused_in_one_short_line() -> None:
    deep: Any = "a"
    for _ in range(5000):
        deep = [deep]
    [line] = told(sizes=deep)[-1:]
    assert len(line) < 300


def test_of_many_problems_the_first_are_told_and_the_rest_counted() -> None:
    lines = told(**{f"field_{i}": i for i in range(100)}, first=3)
    assert len(lines) == MAX_PROBLEMS_TOLD + 1
    assert lines[0] == '"field_0": no such field; the fields are loras, first, sizes'
    assert lines[1] == '"field_1": no such field', "what there is, is listed once"
    assert lines[-1] == "and 91 more"
    exactly = told(**{f"field_{i}": i for i in range(MAX_PROBLEMS_TOLD)})
    assert len(exactly) == MAX_PROBLEMS_TOLD


def test_each_object_with_unknown_fields_lists_its_own() -> None:
    lines = told(first={"path": "aa", "a": 1, "b": 1}, c=1, d=1)
    assert lines == [
        "first.a: no such field; the fields are path, scale, kind",
        "first.b: no such field",
        '"c": no such field; the fields are loras, first, sizes',
        '"d": no such field',
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, 2.5, True, None, "b"]}, '{"a": [1, 2.5, true, null, "b"]}'),
        ({}, "{}"),
        ([[]], "[[]]"),
        ((1, 2), "[1, 2]"),
        ({1: 2, None: 3}, "{1: 2, null: 3}"),
        ("x" * 60, '"' + "x" * 59 + "..."),
        ("x" * 61, "a string of 61 characters"),
        (["x" * 61], "[a string of 61 characters]"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 1..."),
        ([[[[[1]]]]], '[[[["..."]]]]'),
        (10**59, str(10**59)),
        (-(10**60), "an integer of over 60 digits"),
        (1e308, "1e+308"),
        (float("nan"), "NaN"),
        ("\ud800", '"\\ud800"'),
        ("a\nb\u2028c\x85\u202ed", '"a\\nb\\u2028c\\u0085\\u202ed"'),
        ("\u00e9\u732b\U0001f408", '"\u00e9\u732b\U0001f408"'),
        ({1}, "set"),
        (object(), "object"),
    ],
)
def test_values_are_shown_as_short_json(value: Any, text: str) -> None:
    assert shown(value) == text


def test_an_integer_that_python_would_not_write_is_shown() -> None:
    assert shown(10**1_000_000) == "an integer of over 60 digits"


class Watched(list[Any]):
    """A list that counts what is read of it."""

    read = 0

    def __iter__(self) -> Iterator[Any]:
        for one in super().__iter__():
            self.read += 1
            yield one


def test_only_the_beginning_of_a_value_is_read_to_show_it() -> None:
    inner = Watched(["a"] * 1000)
    outer = Watched([inner] * 1000)
    assert shown([outer]).endswith("...")
    assert 0 < inner.read < MAX_SHOWN_CHARACTERS
    assert outer.read == 1
