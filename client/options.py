"""The fields of a request as options of the command, from the input's JSON Schema.

A field that the schema has is an option, a column of a CSV file and a key of a JSON file: nothing
here names one.
"""

import argparse
import base64
import contextlib
import difflib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from client.one_file import SCHEMA

# An error describes a longer value by its beginning.
MAX_SHOWN_CHARACTERS = 60
# Where `_resolved` keeps the constants that a field takes beside its own values.
CONSTANTS = "constants"
# As the worker words them.
BOUNDS = (
    ("minimum", "of at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "of at most"),
    ("exclusiveMaximum", "below"),
)
# What a picture field's pattern says of the picture itself.
PICTURE_PATTERN = "data:image/"

Schema = dict[str, Any]


class UsageError(Exception):
    """What was typed cannot be sent. The message has a line for each problem."""


def load_schema() -> Schema:
    """The JSON Schema of a request's input.

    Raises:
        UsageError: the installation is incomplete.
    """
    try:
        return dict(json.loads(SCHEMA.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(f"{SCHEMA} is missing: install the command again") from None


@dataclass(frozen=True)
class Field:
    """A field of a request, or of an object in one."""

    name: str
    schema: Schema
    """With references followed, and without alternatives that mean "not given"."""
    root: Schema = field(repr=False)

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def kind(self) -> str:
        """JSON's type; "" where the schema leaves it open."""
        return str(self.schema.get("type", ""))

    @property
    def aliases(self) -> list[str]:
        return [str(alias) for alias in self.schema.get("x-aliases", ())]

    @property
    def is_picture(self) -> bool:
        return PICTURE_PATTERN in self.schema.get("pattern", "")

    @property
    def is_free_text(self) -> bool:
        return self.kind == "string" and "enum" not in self.schema

    @property
    def short_form(self) -> str:
        """How an object is typed without the names of its fields: "TYPE:FILE[:SCALE]"."""
        first, *others = self.properties.values()
        form = _placeholder(first)
        if others:
            second = f":{_placeholder(others[0])}"
            form += second if others[0].is_picture else f"[{second}]"
        last = self._number_behind_picture
        return f"{form}[:{_placeholder(last)}]" if last else form

    @property
    def _number_behind_picture(self) -> "Field | None":
        """The number that may end the short form of an object that begins with a picture."""
        first_two, rest = list(self.properties.values())[:2], list(self.properties.values())[2:]
        if not any(one.is_picture for one in first_two):
            return None
        return next((one for one in rest if one.kind in ("integer", "number")), None)

    @cached_property
    def items(self) -> "Field":
        """What a list holds."""
        return Field(self.name, _resolved(self.schema.get("items", {}), self.root), self.root)

    @cached_property
    def properties(self) -> dict[str, "Field"]:
        """What an object holds."""
        return fields_of(self.schema, self.root)

    @property
    def rule(self) -> str:
        """What a value must be, in words."""
        if "x-rule" in self.schema:
            return str(self.schema["x-rule"])
        if "enum" in self.schema:
            return "one of " + ", ".join(map(str, self.schema["enum"]))
        if self.kind == "array":
            return f"a list of {_at_most(self.schema.get('maxItems'))}, each {self.items.rule}"
        if self.kind == "object":
            return "an object with " + ", ".join(self.properties)
        if self.kind == "boolean":
            return "true or false"
        if self.kind == "string":
            limit = self.schema.get("maxLength")
            return "a string" + (f" of at most {limit} characters" if limit else "")
        noun = {"integer": "an integer", "number": "a number"}.get(self.kind, "JSON")
        low, high = self.schema.get("minimum"), self.schema.get("maximum")
        if low is not None and high is not None:
            noun += f" from {low} to {high}"
        else:
            bounds = [f"{told} {self.schema[name]}" for name, told in BOUNDS if name in self.schema]
            noun += " " * bool(bounds) + " and ".join(bounds)
        step = self.schema.get("multipleOf")
        return noun + (f", a multiple of {step}" if step else "")

    def parse(self, text: str, place: str = "") -> Any:
        """A value from what was typed; one that is none is refused later, by `problems`.

        Args:
            place: of an object, for messages: "loras[1]".

        Raises:
            UsageError: it is neither JSON nor one of the short forms of an object.
        """
        match self.kind:
            case "string":
                return text
            case "integer" | "number":
                return _number(text)
            case "boolean":
                return {"true": True, "false": False}.get(text.strip().lower(), text)
            case "array":
                if text.lstrip().startswith("["):
                    return _json(text, self.option)
                return [self.items.parse(text, place or f"{self.name}[0]")]
            case "object":
                return self._parse_object(text, place or self.name)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def _parse_object(self, text: str, place: str) -> Any:
        """JSON, or key=value,key=value, or the short form."""
        if text.lstrip().startswith("{") or not self.properties:
            return _json(text, self.option)
        names = {
            key: one for one in self.properties.values() for key in (one.name, *one.aliases)
        } | self.properties
        pairs: list[tuple[Field, str]] = []
        for part in text.split(","):
            name, equals, value = part.partition("=")
            name = name.strip()
            if equals and name in names:
                pairs.append((names[name], value))
            elif equals and name.isidentifier() and not self._is_of_value(text, pairs):
                near = difflib.get_close_matches(name, self.properties, 1)
                raise UsageError(
                    f"{named(place)}.{name}: no such field"
                    + (f" (did you mean {near[0]}?)" if near else "")
                    + f"; the fields are {', '.join(self.properties)}"
                )
            elif pairs:  # a comma in a value
                pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]},{part}")
            else:
                break
        if pairs:
            return {one.name: one.parse(value) for one, value in pairs}
        made = self._parse_short_form(text)
        self._check_short_form(made, place)
        return made

    def _is_of_value(self, text: str, pairs: "list[tuple[Field, str]]") -> bool:
        """Whether a value may have key=value in it, as an address or a file's name may.

        Args:
            text: all that was typed.
            pairs: what comes before.
        """
        one, before = pairs[-1] if pairs else (next(iter(self.properties.values())), "")
        if not one.is_free_text or not one.is_picture:
            return one.is_free_text
        return not _is_file(before) if pairs else _is_file(text)

    def _parse_short_form(self, text: str) -> dict[str, Any]:
        first, *others = self.properties.values()
        if not others:
            return {first.name: first.parse(text)}
        second = others[0]
        if second.is_picture:
            head, colon, tail = text.partition(":")
            picture, number = self._split_number(tail)
            return {
                first.name: first.parse(head),
                **({second.name: picture} if colon else {}),
                **number,
            }
        if not first.is_free_text:  # no colon is in it
            head, colon, tail = text.partition(":")
            return {
                first.name: first.parse(head),
                **({second.name: second.parse(tail)} if colon else {}),
            }
        number = {}
        if first.is_picture:
            text, number = self._split_number(text)
        head, colon, tail = text.rpartition(":")
        if not colon or tail.startswith("//") or (first.is_picture and _is_file(text)):
            return {first.name: text, **number}
        value = second.parse(tail)
        if (
            isinstance(value, int | float)
            or not problems({second.name: value}, {second.name: second})
            or (first.is_picture and _is_file(head))
        ):
            return {first.name: head, second.name: value, **number}
        return {first.name: text, **number}

    def _split_number(self, text: str) -> tuple[str, dict[str, Any]]:
        """A picture, and the number behind it, if there is one: it is neither a part of a file's
        name nor of an address.
        """
        one = self._number_behind_picture
        head, colon, tail = text.rpartition(":")
        number = _number(tail)
        if one is None or not colon or isinstance(number, str) or _is_file(text):
            return text, {}
        value = {one.name: number}
        # A number that is no scale is a port, or a part of the path.
        is_address = re.match("https?://", text, re.IGNORECASE)
        if is_address and problems(value, {one.name: one}):
            return text, {}
        return head, value

    def _check_short_form(self, made: Mapping[str, Any], place: str) -> None:
        """
        Raises:
            UsageError: there are mistakes in it; the last line tells the form, too.
        """
        plain = {name: made[name] for name in made if not self.properties[name].is_picture}
        found = [
            *problems(plain, self.properties, f"{place}."),
            *(
                f"{named(place)}.{name}: is missing"
                for name in self.schema.get("required", ())
                if name not in made
            ),
        ]
        try:
            _with_files(made, self, place)
        except UsageError as error:
            found.append(str(error))
        if found:
            told = "\n".join(found)
            raise UsageError(f"{told}; the form is {self.short_form}, or key=value,key=value")


def fields_of(schema: Schema, root: Schema | None = None) -> dict[str, Field]:
    """The fields of an object's schema, by their names."""
    root = schema if root is None else root
    return {
        name: Field(name, _resolved(one, root), root)
        for name, one in schema.get("properties", {}).items()
    }


def add_options(
    parser: argparse.ArgumentParser, fields: Mapping[str, Field], *, without: Iterable[str] = ()
) -> None:
    """Give the parser an option for each field; what was not given stays out of its result.

    Args:
        without: names of fields that are no options here.
    """
    group = parser.add_argument_group("fields of the request")
    taken = set(parser._option_string_actions) | {one.option for one in fields.values()}
    for one in fields.values():
        if one.name in without:
            continue
        others = [f"--{alias.replace('_', '-')}" for alias in one.aliases]
        others = [option for option in others if option not in taken]
        taken.update(others)
        common: dict[str, Any] = {"dest": one.name, "default": argparse.SUPPRESS}
        if one.kind == "boolean":
            common |= {"action": argparse.BooleanOptionalAction}
        elif one.kind == "array":
            common |= {"action": "append", "metavar": _metavar(one)}
        else:
            common |= {"metavar": _metavar(one)}
        group.add_argument(one.option, help=_help(one), **common)
        if others:  # taken, but the help is long enough
            group.add_argument(*others, help=argparse.SUPPRESS, **common)


def given(arguments: argparse.Namespace, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The input that the options make.

    Raises:
        UsageError: an object's value is not in one of its forms.
    """
    return _parsed({name: one for name, one in vars(arguments).items() if name in fields}, fields)


def from_row(row: Mapping[str, str], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The input that a line of a table makes; an empty cell is a field that is not given.

    Raises:
        UsageError: an object's value is not in one of its forms.
    """
    return _parsed({name: text for name, text in row.items() if text}, fields)


def _parsed(values: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Each text, or list of texts, as the value of its field; the rest as it is."""
    made: dict[str, Any] = {}
    mistakes: list[str] = []
    for name, value in values.items():
        if name not in fields or not isinstance(value, str | list):
            made[name] = value
            continue
        one, items = fields[name], 0
        for text in value if isinstance(value, list) else [value]:
            try:
                if one.kind != "array":
                    made[name] = one.parse(text)
                    continue
                part = one.parse(text, f"{name}[{items}]")
            except UsageError as error:
                mistakes.append(str(error))
                items += 1
                continue
            made.setdefault(name, []).extend(part)
            items += len(part)
    if mistakes:
        raise UsageError("\n".join(mistakes))
    return made


def own_names(job_input: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The input with other services' names replaced by the fields', and without nulls.

    Raises:
        UsageError: a field is there under two names.
    """
    names = {alias: one.name for one in fields.values() for alias in one.aliases}
    result: dict[str, Any] = {}
    for key, value in job_input.items():
        name = key if key in fields else names.get(key, key)
        if name in result:
            raise UsageError(f"{key}: is {name}, which is given as well; leave one of them out")
        if value is not None:
            result[name] = value
    return result


def with_files(job_input: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The input with each path of a picture replaced by the picture, as a data URI.

    Raises:
        UsageError: a file cannot be read, or is no picture.
    """
    return {name: _with_files(value, fields.get(name), name) for name, value in job_input.items()}


def _with_files(value: Any, one: Field | None, place: str) -> Any:
    if one is None:
        return value
    if isinstance(value, list):
        return [_with_files(item, one.items, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {
            name: _with_files(item, one.properties.get(name), f"{place}.{name}")
            for name, item in value.items()
        }
    if not isinstance(value, str) or not one.is_picture or re.search(one.schema["pattern"], value):
        return value
    return data_uri(value, place)


def pictures_left_out(
    job_input: Mapping[str, Any], fields: Mapping[str, Field], *, without: Iterable[str] = ()
) -> Iterator[str]:
    """The places of pictures of which there is neither an address nor all of a data URI.

    Args:
        without: names of fields that do not matter.
    """
    for name, value in job_input.items():
        if name in fields and name not in without:
            yield from _pictures_left_out(value, fields[name], name)


def _pictures_left_out(value: Any, one: Field, place: str) -> Iterator[str]:
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _pictures_left_out(item, one.items, f"{place}[{i}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            if name in one.properties:
                yield from _pictures_left_out(item, one.properties[name], f"{place}.{name}")
    elif one.is_picture and not re.match("https?://|data:[^,]*,", str(value), re.IGNORECASE):
        yield place


def data_uri(path: str, place: str) -> str:
    """
    Args:
        place: the field, for messages.

    Raises:
        UsageError: the file cannot be read, or is no picture.
    """
    try:
        content = Path(path).expanduser().read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            media_type = picture.get_format_mimetype()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no picture"
        raise UsageError(
            f"{named(place)}: {_shown(path)} is neither an address nor a picture's file: {reason}"
        ) from None
    return f"data:{media_type or 'image/png'};base64,{base64.b64encode(content).decode()}"


def check(job_input: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """
    Raises:
        UsageError: a value breaks the rule of its field. What goes with what, the worker judges.
    """
    if found := problems(job_input, fields):
        raise UsageError("\n".join(found))


def problems(
    job_input: Mapping[str, Any], fields: Mapping[str, Field], before: str = ""
) -> list[str]:
    """The problems of an input, a line for each."""
    found: list[str] = []
    for name, value in job_input.items():
        place = f"{before}{name}"
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            found.append(
                f"{place}: unknown field" + (f" (did you mean {near[0]}?)" if near else "")
            )
        else:
            found += _problems_of(value, fields[name], place)
    return found


def _problems_of(value: Any, one: Field, place: str) -> list[str]:
    if not _fits(value, one):
        near: list[str] = []
        if isinstance(value, str) and "enum" in one.schema:
            near = difflib.get_close_matches(value, map(str, one.schema["enum"]), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return [f"{named(place)}: must be {one.rule}; got {_shown(value)}{hint}"]
    if isinstance(value, list):
        return [
            problem
            for i, item in enumerate(value)
            for problem in _problems_of(item, one.items, f"{place}[{i}]")
        ]
    if isinstance(value, dict) and one.properties:
        missing = [name for name in one.schema.get("required", ()) if name not in value]
        return [
            *(f"{named(place)}.{name}: is missing" for name in missing),
            *problems(value, one.properties, f"{place}."),
        ]
    return []


def _fits(value: Any, one: Field) -> bool:
    """Whether a value keeps the rules of its field itself, not of what is inside it."""
    schema = one.schema
    if not isinstance(value, bool) and value in schema.get(CONSTANTS, ()):
        return True
    if "enum" in schema and value not in schema["enum"]:
        return False
    match one.kind:
        case "string":
            if not isinstance(value, str):
                return False
            limits = schema.get("minLength", 0), schema.get("maxLength", math.inf)
            pattern = schema.get("pattern")
            return limits[0] <= len(value) <= limits[1] and (
                pattern is None or re.search(pattern, value) is not None
            )
        case "integer" | "number":
            if isinstance(value, bool) or not isinstance(value, int | float):
                return False
            if not math.isfinite(value) or (one.kind == "integer" and value != int(value)):
                return False
            step = schema.get("multipleOf")
            bounds = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
            is_out = value <= schema.get("exclusiveMinimum", -math.inf) or value >= schema.get(
                "exclusiveMaximum", math.inf
            )
            fits = bounds[0] <= value <= bounds[1] and not is_out
            return fits and (not step or value % step == 0)
        case "boolean":
            return isinstance(value, bool)
        case "array":
            sizes = schema.get("minItems", 0), schema.get("maxItems", math.inf)
            return isinstance(value, list) and sizes[0] <= len(value) <= sizes[1]
        case "object":
            return isinstance(value, dict)
    return True


def named(place: str) -> str:
    """The option of a field, with what is inside it: "loras[1].scale" is "--loras[1].scale"."""
    name, rest = re.match(r"(\w*)(.*)", place, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"--{name.replace('_', '-')}{rest}"


def with_options_named(error: str, fields: Mapping[str, Field]) -> str:
    """The worker's error, in whose lines a field is called as its option is."""
    lines = []
    for line in error.splitlines():
        place, colon, rest = line.partition(": ")
        is_field = colon and re.split(r"[\[.]", place)[0] in fields
        lines.append(f"{named(place)}: {rest}" if is_field else line)
    return "\n".join(lines)


def _resolved(schema: Schema, root: Schema) -> Schema:
    """With the reference followed, and of alternatives the one that is neither null nor a constant;
    what stands outside counts.
    """
    if "$ref" in schema:
        target: Any = root
        for key in schema["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    for union in ("anyOf", "oneOf"):
        options = schema.get(union, ())
        constants = [one["const"] for one in options if set(one) == {"const"}]
        others = [one for one in options if one.get("type") != "null" and set(one) != {"const"}]
        if len(others) == 1:
            outside = {key: value for key, value in schema.items() if key != union}
            return {**_resolved(others[0], root), **outside, CONSTANTS: constants}
    return schema


def _number(text: str) -> Any:
    """An int keeps all digits of a seed; what is no number stays text, and is refused as such."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def input_of(text: str) -> dict[str, Any]:
    """The input in a text with one, or with a whole job.

    Raises:
        UsageError: there is none in it.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"is not valid JSON: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("input"), dict):
        value = value["input"]
    if not isinstance(value, dict):
        raise UsageError("must be an input, a JSON object")
    return value


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: {_shown(text)} is not valid JSON: {error}") from None


def _at_most(limit: int | None) -> str:
    return "any number" if limit is None else f"at most {limit}"


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_SHOWN_CHARACTERS:
        text = text[:MAX_SHOWN_CHARACTERS] + "..."
    return json.dumps(text, ensure_ascii=False) if isinstance(value, str) else text


def _is_file(text: str) -> bool:
    # Too long a name, or the home of somebody who is not there.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return Path(text).expanduser().is_file()
    return False


def _placeholder(one: Field) -> str:
    return "FILE" if one.is_picture else one.name.upper()


def _metavar(one: Field) -> str:
    if one.is_picture:
        return "FILE|URL"
    whole = one.items if one.kind == "array" else one
    if whole.properties:
        return whole.short_form
    if one.kind == "array":
        return "TEXT"
    return {"integer": "N", "number": "X", "string": "TEXT"}.get(one.kind, "JSON")


def _help(one: Field) -> str:
    told = str(one.schema.get("description", ""))
    if one.kind in ("integer", "number", "array", "object") or "enum" in one.schema:
        told += f" ({one.rule})"
    if one.kind == "array":
        told += " May be given several times; JSON and key=value,key=value are taken too."
    elif one.properties:
        told += " JSON and key=value,key=value are taken too."
    told = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", told)  # a link's text
    return told.replace("`", "").replace("%", "%%").strip()
