"""What all objects that a caller sends have in common, whatever their fields."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from sdxl_worker.errors import RequestError
from sdxl_worker.wording import IN_WORDS, MAX_SHOWN_CHARACTERS, shown

# Several times what all fields together have room for, and little enough to validate at once.
MAX_VALUES = 1000
MAX_NESTING = 8


class InputModel(BaseModel):
    """An object that a caller sends, immutable once it is validated. `null` means "not given"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def as_given(cls, fields: Mapping[Any, Any]) -> dict[str, Any]:
        """The fields that were given, without those whose value means "not given"."""
        return {_readable(name): value for name, value in fields.items() if value is not None}

    @classmethod
    def broken_ties(cls, given: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:  # noqa: ARG003
        """Rules between fields that the input breaks: the field, and the problem in words.

        The model's JSON Schema has to state the same rules, as far as it can.
        """
        yield from ()

    @classmethod
    def with_implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The fields with those that follow from them."""
        return given

    @model_validator(mode="wrap")
    @classmethod
    def _tell_all_problems(cls, fields: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate as pydantic does, but report broken ties together with the other problems."""
        if not isinstance(fields, Mapping):
            return validate(fields)
        given = cls.as_given(fields)
        errors = [
            InitErrorDetails(type=PydanticCustomError(IN_WORDS, problem), loc=(name,), input=None)
            for name, problem in cls.broken_ties(given)
        ]
        try:
            model = validate(cls.with_implied(given))
        except ValidationError as error:
            errors += [_again(details) for details in error.errors(include_url=False)]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return model


def _again(details: Any) -> InitErrorDetails:
    """An error that was raised, in a form that can be raised again."""
    kind = details["type"]
    if kind == IN_WORDS:
        kind = PydanticCustomError(IN_WORDS, details["msg"])
    again = InitErrorDetails(type=kind, loc=details["loc"], input=details["input"])
    return InitErrorDetails(**again, ctx=details["ctx"]) if "ctx" in details else again


def _readable(name: object) -> str:
    """JSON can carry half a character (a lone surrogate), at which pydantic stops reading names.

    What can be no field's name is described, which costs less than to pass it on.
    """
    if not isinstance(name, str) or len(name) > MAX_SHOWN_CHARACTERS:
        return shown(name)
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def check_extent(job_input: Mapping[Any, Any]) -> None:
    """Refuse what no request looks like, before it costs time. Strings may be of any length.

    Raises:
        RequestError: it has too many values, or too deep ones.
    """
    count, level = 0, [job_input]
    for _ in range(MAX_NESTING):
        count += sum(map(len, level))
        if count > MAX_VALUES:
            raise RequestError(f"input: must hold at most {MAX_VALUES} values in all; got more")
        level = [inner for holder in level for inner in _values(holder) if _is_holder(inner)]
    if level:
        raise RequestError(f"input: must be at most {MAX_NESTING} objects or lists deep; got more")


def _is_holder(value: object) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _values(holder: Any) -> Iterable[Any]:
    return holder.values() if isinstance(holder, Mapping) else holder
