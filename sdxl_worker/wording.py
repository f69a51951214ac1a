"""Messages about an input that breaks its rules, worded from the rules themselves.

For any pydantic model, with objects, lists and unions inside: one line for each problem, with the
path of the field, the rule and the value: "loras[1].scale: must be a number from -5 to 5; got 7".
Of many problems the first are told, and of a value its beginning: that is also all that is read.
"""

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

MAX_PROBLEMS_TOLD = 10
# An error describes a longer value instead of repeating it.
MAX_SHOWN_CHARACTERS = 60
# The type of errors that carry their own message: broken rules between fields.
IN_WORDS = "in_words"
RULE = "x-rule"
"""In a field's JSON Schema: its rule in words, where the schema's own would be unclear."""
ALIASES = "x-aliases"
"""In a field's JSON Schema: what other services call it. They are told, not taken."""
NAMES = "x-names"
"""In a field's JSON Schema: of its values, those to offer; the others are other names of these."""

BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "of at most",
    "exclusiveMaximum": "below",
}
# Deeper inside, a value is not shown.
MAX_DEPTH = 4

Schema = dict[str, Any]


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """The problems of an input that `model` refused, one line each: unknown fields first.

    After `MAX_PROBLEMS_TOLD` lines a last one counts the rest.
    """
    schema = _schema(model)
    found = [(_find(one["loc"], schema), one) for one in error.errors(include_url=False)]
    # The objects and lists inside which something is wrong.
    around = {
        place.path[:i] for place, _ in found for i, mark in enumerate(place.path) if mark in ".["
    }
    # A field that breaks several of its rules gets only one line.
    broken: dict[tuple[bool, str], tuple[_Place, ErrorDetails]] = {}
    for place, details in found:
        if place.is_union and place.path in around:
            continue  # the value was meant for the alternative in which something is wrong
        is_known = details["type"] not in ("extra_forbidden", "invalid_key")
        broken.setdefault((is_known, place.path), (place, details))
    lines: list[str] = []
    for is_known, path in sorted(broken, key=lambda key: key[0])[:MAX_PROBLEMS_TOLD]:
        place, details = broken[is_known, path]
        if is_known:
            lines.append(_problem(place, details))
            continue
        line, fields = _unknown_field(place, details["loc"])
        # Of several in one object, the first line lists the fields that there are.
        is_told = any(one.endswith(fields) for one in lines)
        lines.append(line if is_told else line + fields)
    rest = len(broken) - len(lines)
    return [*lines, f"and {rest} more"] if rest else lines


def rule(schema: Schema) -> str:
    """The rule of a JSON Schema in words: "an integer from 1 to 8"."""
    schema, *others = _alternatives(schema)
    if others:
        return " or ".join(rule(one) for one in (schema, *others))
    if RULE in schema:
        return str(schema[RULE])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return json.dumps(schema["const"])
    kind = schema.get("type")
    if kind == "object":
        fields = schema.get("properties")
        return "an object" + (f" with {', '.join(fields)}" if fields else "")
    if kind == "array":
        sizes = [("at least", schema.get("minItems")), ("at most", schema.get("maxItems"))]
        count = " and ".join(f"{words} {number}" for words, number in sizes if number)
        each = f", each {rule(schema['items'])}" if "items" in schema else ""
        return f"a list{count and ' of '}{count}{each}"
    if kind == "boolean":
        return "true or false"
    words = {"integer": "an integer", "number": "a number", "string": "a string"}.get(
        str(kind), "another value"
    )
    if "minimum" in schema and "maximum" in schema:
        words += f" from {schema['minimum']} to {schema['maximum']}"
    else:
        bounds = [f"{told} {schema[name]}" for name, told in BOUNDS.items() if name in schema]
        words += " " * bool(bounds) + " and ".join(bounds)
    if "multipleOf" in schema:
        words += f", a multiple of {schema['multipleOf']}"
    if "minLength" in schema:
        words += f" of at least {schema['minLength']} characters"
    if "maxLength" in schema:
        words += f" of at most {schema['maxLength']} characters"
    return words


@dataclass(frozen=True)
class _Place:
    """Where in an input a problem is."""

    path: str
    schema: Schema
    parent: Schema
    """The schema of the object or list around it."""

    @property
    def is_union(self) -> bool:
        return len(_alternatives(self.schema)) > 1


def _find(location: tuple[int | str, ...], root: Schema) -> _Place:
    """The place that pydantic's `loc` of an error leads to."""
    path, schema, parent = "", root, root
    rest = list(location)
    while rest:
        name = rest.pop(0)
        options = _alternatives(schema)
        if len(options) > 1:
            # Here pydantic names the alternative that it tried; what is wrong inside comes after.
            if not rest:
                break
            schema = max(options, key=lambda option: _suits(option, name, rest[0]))
            continue
        [parent] = options
        if isinstance(name, int):
            in_turn = parent.get("prefixItems", [])
            schema = in_turn[name] if name < len(in_turn) else parent.get("items", {})
            path = f"{path}[{name}]"
        else:
            fields = parent.get("properties", {})
            schema = fields.get(name) or parent.get("additionalProperties") or {}
            schema = schema if isinstance(schema, dict) else {}
            # What is no field is the caller's word, and may be anything.
            told = (
                name if name in fields or (len(name) < 40 and name.isidentifier()) else shown(name)
            )
            path = f"{path}.{told}" if path else told
    return _Place(path, schema, parent)


def _suits(option: Schema, tag: object, inside: int | str) -> int:
    """How well an alternative of a union suits an error inside it: the higher, the better.

    Args:
        tag: what pydantic calls the alternative; of a discriminated union, the value that tells.
        inside: the field or place that comes next in the error's `loc`.
    """
    if isinstance(inside, int):
        return int(option.get("type") == "array")
    if option.get("type") != "object":
        return 0
    fields = option.get("properties", {})
    is_told = any(tag == one.get("const") or tag in one.get("enum", ()) for one in fields.values())
    return 1 + (inside in fields) + 4 * is_told


def _problem(place: _Place, details: ErrorDetails) -> str:
    path, words = place.path, rule(place.schema)
    if details["type"] == IN_WORDS:
        return f"{path}: {details['msg']}"
    if details["type"] == "missing":
        return f"{path}: required, {words}; got nothing"
    value = details["input"]
    if details["type"] in ("too_long", "too_short"):
        return f"{path}: must be {words}; got a list of {len(value)}"
    choices = [str(one) for part in _alternatives(place.schema) for one in part.get("enum", ())]
    return f"{path}: must be {words}; got {shown(value)}{near_match(value, choices)}"


def _unknown_field(place: _Place, location: tuple[int | str, ...]) -> tuple[str, str]:
    """The problem, and the fields that there are."""
    fields, name = place.parent.get("properties", {}), location[-1]
    where = place.path if len(location) > 1 else shown(name)
    aliases = {alias: field for field in fields for alias in fields[field].get(ALIASES, ())}
    meant = f" (did you mean {aliases[name]}?)" if name in aliases else near_match(name, fields)
    return f"{where}: no such field{meant}", (f"; the fields are {', '.join(fields)}")


def _alternatives(schema: Schema) -> list[Schema]:
    """What a value may be, except null and bare constants, which mean "not given"."""
    if "type" in schema:
        return [schema]  # an object's own `anyOf` ties its fields together
    options = schema.get("anyOf") or schema.get("oneOf") or [schema]
    options = [one for one in options if one.get("type") != "null" and set(one) != {"const"}]
    if len(options) == 1 and options[0] is not schema and "type" not in options[0]:
        return _alternatives(options[0])  # a union within the only one
    # A field's own description and default stand beside its only alternative.
    return [{**options[0], **schema}] if len(options) == 1 else options


def field_schemas(model: type[BaseModel]) -> dict[str, Schema]:
    """JSON Schema of each field, with the bounds of an optional one at its top level."""
    properties = _schema(model)["properties"]
    return {name: {**schema, **_alternatives(schema)[0]} for name, schema in properties.items()}


@functools.cache
def _schema(model: type[BaseModel]) -> Schema:
    """A model's schema, with each definition in the places that refer to it."""
    root = model.model_json_schema()

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            definition = root["$defs"][part["$ref"].rpartition("/")[2]]
            part = {**definition, **part}
        return {name: resolved(one) for name, one in part.items() if name not in ("$ref", "$defs")}

    return resolved(root)


def near_match(value: object, choices: Iterable[str]) -> str:
    """ " (did you mean X?)" where one of the choices is much like a value; otherwise ""."""
    if not isinstance(value, str):
        return ""
    by_lower_case = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(value[:100].lower(), by_lower_case, n=1)
    return f" (did you mean {by_lower_case[matches[0]]}?)" if matches else ""


def shown(value: object) -> str:
    """A value as JSON, for an error message: short, and without the secrets of a URL's query."""
    text = ""
    for part in _parts(value):
        text += part
        if len(text) > MAX_SHOWN_CHARACTERS:
            text = text[:MAX_SHOWN_CHARACTERS] + "..."
            break
    return printable(text)


def printable(text: str) -> str:
    """JSON, also that of a file's header, can carry half a character (a lone surrogate), which no
    answer can be encoded with, and characters that end lines or turn them around."""
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)


def _parts(value: object, depth: int = 0) -> Iterator[str]:
    """A value as JSON, part by part, so that a large one need not be read to its end."""
    if isinstance(value, (Mapping, list, tuple)) and depth == MAX_DEPTH:
        yield '"..."'
    elif isinstance(value, Mapping):
        yield "{"
        for i, (name, inner) in enumerate(value.items()):
            yield ", " * bool(i)
            yield from _parts(name, depth + 1)
            yield ": "
            yield from _parts(inner, depth + 1)
        yield "}"
    elif isinstance(value, (list, tuple)):
        yield "["
        for i, inner in enumerate(value):
            yield ", " * bool(i)
            yield from _parts(inner, depth + 1)
        yield "]"
    elif isinstance(value, str):
        if len(value) > MAX_SHOWN_CHARACTERS:
            yield f"a string of {len(value)} characters"
        else:
            told = re.sub(r"\S+", lambda word: _without_secrets_in_word(word[0]), value)
            yield json.dumps(told, ensure_ascii=False)
    elif isinstance(value, int) and abs(value) >= 10**MAX_SHOWN_CHARACTERS:
        yield f"an integer of over {MAX_SHOWN_CHARACTERS} digits"  # Python writes 4300 at most
    elif value is None or isinstance(value, (int, float)):
        yield json.dumps(value)
    else:
        yield type(value).__name__


def _without_secrets_in_word(word: str) -> str:
    """Of what may be an address, or one with a mistake: nothing before "@", nor a query."""
    if not any(mark in word for mark in "/=@"):
        return word
    word = re.split("[?#]", word)[0]
    scheme, separator, rest = word.partition("://")
    return "".join(part.rpartition("@")[2] for part in (scheme, separator, rest))


def without_secrets(url: str) -> str:
    """The address without user, password, query and fragment, any of which may hold a secret.

    The address need not be valid, and is not parsed: `urlsplit` raises at "http://[".
    """
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
