"""Values drawn from a JSON Schema: such as it allows, and such as it nearly allows.

They know the schema only, so that a new field is tested by being there. The part of JSON Schema
that pydantic writes for the worker's fields is enough.
"""

import functools
import math
from typing import Any

import jsonschema
from hypothesis import strategies as st

Schema = dict[str, Any]
Values = st.SearchStrategy[Any]

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

# What may be a part of an address is not told as it is.
NAMES = st.text(st.characters(exclude_characters="/=@"), max_size=5)

anything: Values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
"""Any JSON value."""


def valid(schema: Schema, root: Schema) -> Values:
    """Values that the schema allows; `root` holds what it refers to."""
    schema = _resolved(schema, root)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            step = schema.get("multipleOf", 1)
            low, high = schema.get("minimum", -(2**53)), schema.get("maximum", 2**53)
            whole = st.integers(math.ceil(low / step), high // step).map(lambda n: n * step)
            # JSON has one type of number, but not all integers are exact in it.
            return whole | whole.filter(lambda n: int(float(n)) == n).map(float)
        case "number":
            low, low_out = schema.get("minimum"), schema.get("exclusiveMinimum")
            high, high_out = schema.get("maximum"), schema.get("exclusiveMaximum")
            return st.floats(
                low if low is not None else low_out,
                high if high is not None else high_out,
                exclude_min=low_out is not None,
                exclude_max=high_out is not None,
                allow_nan=False,
                allow_infinity=False,
            ).map(lambda x: int(x) if x.is_integer() else x)
        case "string" if "pattern" in schema:
            # To Python, and so to the judge, "$" also matches before a last line break.
            return st.from_regex(schema["pattern"], fullmatch=schema["pattern"].endswith("$"))
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=schema.get("maxLength"))
        case "array":
            items = valid(schema["items"], root)
            return st.lists(
                items,
                min_size=schema.get("minItems", 0),
                max_size=schema.get("maxItems", 5),
                unique=schema.get("uniqueItems", False),
            )
        case "object":
            # An object's own `anyOf` ties its fields together.
            of_ties = [_object(schema, tie, root) for tie in schema.get("anyOf", [{}])]
            return st.one_of(of_ties).map(functools.partial(_keeping_ties, schema))
    return st.one_of([valid(one, root) for one in _options(schema)])


def nearly(schema: Schema, root: Schema) -> Values:
    """Values around the edges of what the schema allows, and any others."""
    schema = _resolved(schema, root)
    near: list[Values] = [valid(schema, root), anything]
    edges = [schema[name] for name in BOUNDS if name in schema]
    if edges:
        steps = [-1, -0.5, -1e-9, 0, 1e-9, 0.5, 1]
        near.append(
            st.sampled_from([type(edge + step)(edge + step) for edge in edges for step in steps])
        )
    if "enum" in schema:
        near.append(st.sampled_from([str(one)[:-1] for one in schema["enum"]]))
        near.append(st.sampled_from([str(one).swapcase() for one in schema["enum"]]))
    for name in ("minLength", "maxLength"):
        if name in schema:
            near.append(st.sampled_from([schema[name] + i for i in (-1, 0, 1)]).map("é".__mul__))
    if "items" in schema:
        most = schema.get("maxItems", 4) + 1
        near.append(st.lists(nearly(schema["items"], root), max_size=most))
    if "properties" in schema:
        fields = {name: nearly(one, root) for name, one in schema["properties"].items()}
        known = st.fixed_dictionaries({}, optional=fields)
        other = st.dictionaries(
            NAMES | st.sampled_from(list(fields)).map(str.upper), anything, max_size=2
        )
        near.append(st.tuples(other, known).map(lambda both: {**both[0], **both[1]}))
    near += [nearly(one, root) for one in _options(schema)]
    return st.one_of(near)


def _object(schema: Schema, tie: Schema, root: Schema) -> Values:
    fields = schema["properties"]
    required = {*schema.get("required", ()), *tie.get("required", ())}
    if "maxProperties" in tie:
        fields = {name: fields[name] for name in required}
    values = {name: valid(one, root) for name, one in fields.items()}
    for name, rule in tie.get("properties", {}).items():
        values[name] = values[name].filter(jsonschema.Draft202012Validator(rule).is_valid)
    return st.fixed_dictionaries(
        {name: one for name, one in values.items() if name in required},
        optional={name: one for name, one in values.items() if name not in required},
    )


def _keeping_ties(schema: Schema, value: dict[str, Any]) -> dict[str, Any]:
    """Without the fields whose `dependentSchemas` the rest does not keep."""
    while broken := [
        name
        for name, rule in schema.get("dependentSchemas", {}).items()
        if name in value and not jsonschema.Draft202012Validator(rule).is_valid(value)
    ]:
        del value[broken[0]]
    return value


def _options(schema: Schema) -> list[Schema]:
    return [] if "type" in schema else schema.get("anyOf") or schema.get("oneOf") or []


def _resolved(schema: Schema, root: Schema) -> Schema:
    if "$ref" in schema:
        return root["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema
