"""OpenAI's image API: a call of `/openai/v1/...`, as the platform hands it over, becomes a request
of ours, and our output the body that OpenAI's clients expect.

Each parameter is declared once, in `ImagesInput`, with what becomes of it: the documents' table and
the error messages come from there. Those that are not there are the worker's own, `prompt` and
`output_format` among them.
"""

import contextlib
import functools
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from sdxl_worker.errors import OpenAIRequestError, RequestError, ToldToEndError
from sdxl_worker.few_step import REFINER_FIELDS
from sdxl_worker.field_types import (
    MAX_IMAGES,
    MAX_SIDE_PX,
    MIN_SIDE_PX,
    SIDE_MULTIPLE_PX,
    FromIntegralFloat,
)
from sdxl_worker.input_model import InputModel, check_extent
from sdxl_worker.request import Request, parse_request
from sdxl_worker.settings import Settings
from sdxl_worker.wording import RULE, field_schemas, problems, shown

GENERATIONS, EDITS, MODELS = ROUTES = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/models",
)
# Models of OpenAI's, whose names its clients send by default.
OPENAI_MODEL = re.compile(r"(chat)?gpt-image.*|dall-e.*", re.DOTALL)
# What our messages call what OpenAI's parameters stand for; the longer before what is in it.
IN_OPENAI_WORDS = {
    "upload_urls or the worker's BUCKET_ENDPOINT_URL": "response_format url with storage",
    "both height and width": "size",
    "height and width": "size",
    "height, width": "size",
    "num_images": "n",
    "output_quality": "output_compression",
    "image_url": "image",
    "mask_url": "mask",
}
# In messages, names that are those of objects in a call: anywhere, and in a line on one of them.
OF_OBJECTS = r"an object with \w+(?:, \w+)*"
OF_AN_OBJECT = r"\(did you mean \w+\?\)|; the fields are .*"
# What the body has beside the pictures that our own output has not.
BESIDE_BYTES = 1000
# Of a form's text that may be a number, or a list with LoRAs.
MAX_FORM_CHARACTERS = 20_000


@dataclass(frozen=True)
class Level:
    """What a `quality` stands for."""

    name: str
    """The one of OpenAI's that the answer tells."""
    steps: int | None = None
    """Of the base. None: as many as without."""
    is_refined: bool = True
    """Whether the refiner draws, where it would without."""


LEVELS: Mapping[str, Level] = MappingProxyType(
    {
        "low": Level("low", 15, is_refined=False),
        **dict.fromkeys(("medium", "standard", "auto"), Level("medium")),
        **dict.fromkeys(("high", "hd"), Level("high", 40)),
        "xhigh": Level("xhigh", 60),
        "max": Level("max", 80),
    }
)


def _checked_size(size: str) -> str:
    if size != "auto":
        sides = re.fullmatch(r"([0-9]{2,4})[xX]([0-9]{2,4})", size)
        if sides is None or not all(
            MIN_SIDE_PX <= int(side) <= MAX_SIDE_PX and int(side) % SIDE_MULTIPLE_PX == 0
            for side in sides.groups()
        ):
            raise ValueError
    return size


def _one_picture(value: object) -> object:
    """An address as it is, base64 with and without its media type as a data URI of a picture."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        return value
    header = re.match(r"(?i)data:[^,]{0,200};base64,", value)
    if header or re.match(r"[A-Za-z0-9+/]{16}", value):
        # What it is, the decoder tells from its bytes.
        return "data:image/png;base64," + value[header.end() if header else 0 :]
    return value


Picture = Annotated[
    str,
    BeforeValidator(_one_picture),
    Field(
        pattern=r"(?i)^(https?://[^/]|data:image/)",
        json_schema_extra={
            RULE: "one picture: a file of a form, base64 or a data:image/ URI in JSON, or an "
            "http:// or https:// address"
        },
    ),
]
Unused = Annotated[Any, Field(json_schema_extra={RULE: "anything"})]


def _left_out(why: str) -> Any:
    return Field(default=None, json_schema_extra={RULE: f"left out: {why}"}, description="Refused.")


class ImagesInput(InputModel):
    """OpenAI's parameters, but for those that the worker has by the same name and meaning."""

    image: Picture | None = Field(
        default=None,
        description="Of edits: the picture to edit, `image_url`. Several are refused. Without "
        "`mask`, what is transparent in it is repainted; if nothing is, all of it is redrawn "
        "(`mode` `img2img`), as far as `strength` says.",
    )
    mask: Picture | None = Field(
        default=None,
        description="Of edits: what is transparent in this picture, by half and more, is repainted "
        "in `image`, and the rest stays as it is. With `mask_from_alpha` false, what is white.",
    )
    model: Annotated[str, Field(max_length=200)] | None = Field(
        default=None,
        json_schema_extra={RULE: "a model's name, of at most 200 characters"},
        description="One that `/models` lists. Names of OpenAI's own, `gpt-image-...` and "
        "`dall-e-...`, which clients send by default, mean the worker's default.",
    )
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES), FromIntegralFloat] | None = Field(
        default=None, description="How many pictures, `num_images`."
    )
    size: Annotated[str, AfterValidator(_checked_size)] | None = Field(
        default=None,
        json_schema_extra={
            RULE: f"auto, or WIDTHxHEIGHT, each from {MIN_SIDE_PX} to {MAX_SIDE_PX} and a multiple "
            f"of {SIDE_MULTIPLE_PX}"
        },
        description="`width` and `height`. `auto`, or not given: the model's native size, of edits "
        "the size of `image`.",
    )
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = (
        Field(
            default=None,
            description="How many steps, and whether the refiner draws: see below.",
        )
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None,
        description="`b64_json`, the default: the picture in the answer, also where the worker "
        "has storage. `url`: a link where it has; without storage, a `data:` URI.",
    )
    output_compression: Annotated[int, Field(ge=0, le=100), FromIntegralFloat] | None = Field(
        default=None,
        description="`output_quality` of JPEG and WebP, 0 as 1: the higher, the larger and better.",
    )
    background: Literal["auto", "opaque"] | None = Field(
        default=None,
        json_schema_extra={RULE: "auto or opaque: no picture here has a transparent background"},
        description="Every picture is opaque.",
    )
    stream: Literal[False] | None = Field(
        default=None,
        json_schema_extra={RULE: "false, or left out: pictures come when they are done"},
        description="`true` is refused.",
    )
    partial_images: Unused = Field(default=None, description="Of `stream`: no use without it.")
    style: Unused = Field(
        default=None, description="Not used, which `warning` tells: say it in the prompt."
    )
    input_fidelity: Unused = Field(
        default=None,
        description="Not used, which `warning` tells: a lower `strength` keeps more of `image`.",
    )
    complexity: Unused = Field(default=None, description="Not used, which `warning` tells.")
    moderation: Unused = Field(
        default=None,
        description="Not used: whether pictures are judged is [the owner's "
        "choice](control.md#safety-checker).",
    )
    user: Unused = Field(default=None, description="Not used, and not logged.")
    safety_identifier: Unused = Field(default=None, description="Not used, and not logged.")
    markup: None = _left_out("send a mask")
    svg: None = _left_out("pictures are of pixels")
    frame_count: None = _left_out("pictures do not move")
    frame_duration_ms: None = _left_out("pictures do not move")


# Whoever sends these may expect another picture.
TOLD_IF_SENT = ("style", "input_fidelity", "complexity")


@dataclass(frozen=True)
class ImagesCall:
    """A call for pictures: the request that it stands for, and how it wants its answer."""

    request: Request
    openai: ImagesInput
    words: Mapping[str, str]
    """Those of `IN_OPENAI_WORDS` that the caller uses, who may also use our own."""
    takes_holes: bool
    """Whether what is transparent in the picture is repainted, if anything is."""
    wants_links: bool

    @property
    def warnings(self) -> list[str]:
        return [
            f"{name}: not used here"
            for name in TOLD_IF_SENT
            if getattr(self.openai, name) is not None
        ]

    @property
    def _level(self) -> Level:
        return LEVELS[self.openai.quality or "auto"]

    def with_quality(self, request: Request, settings: Settings) -> Request:
        """The request with the steps that its quality stands for, as far as neither the caller nor
        a few-step model has named some, and the worker's owner allows them.

        Args:
            request: as `with_settings_of` returns it.
        """
        level, named = self._level, request.model_fields_set
        changes: dict[str, Any] = {}
        if level.steps is not None and "num_inference_steps" not in named:
            allowed = max(settings.max_steps, request.num_inference_steps)
            changes["num_inference_steps"] = min(level.steps, allowed)
        refiner_alone = request.image_url is not None and request.mode != "img2img"
        if not level.is_refined and named.isdisjoint(REFINER_FIELDS) and not refiner_alone:
            changes["refiner_inference_steps"] = 0
        return request.model_copy(update=changes)

    def body(
        self,
        output: Mapping[str, Any],
        *,
        size_px: tuple[int, int],
        output_format: str,
        model: str,
    ) -> dict[str, Any]:
        """https://platform.openai.com/docs/api-reference/images/object, with the seed, the model
        and what else our own output has, such as a warning, beside it.

        Args:
            output: our own, of `build_output`.
            output_format: what was to be made; those in the answer may have become JPEG to fit.
        """
        images = output["images"]
        made = next((uri for uri in images if uri.startswith("data:")), None)
        if made is not None:
            output_format = made.partition(";")[0].removeprefix("data:image/")
        return {
            "created": int(time.time()),
            "data": [
                {"url": image} if self.wants_links else {"b64_json": image.partition(",")[2]}
                for image in images
            ],
            "background": "opaque",
            "output_format": output_format,
            "quality": self._level.name,
            "size": f"{size_px[0]}x{size_px[1]}",
            "model": model,
            "seed": output["seed"],
            **{name: output[name] for name in ("maps", "nsfw", "warning") if name in output},
        }

    @contextlib.contextmanager
    def in_its_words(self) -> Iterator[None]:
        """Messages to the caller name the fields as the caller did."""
        try:
            yield
        except RequestError as error:
            kind = ToldToEndError if isinstance(error, ToldToEndError) else OpenAIRequestError
            raise kind(_reworded(str(error), self.words)) from None


def is_openai_call(job_input: object) -> bool:
    return isinstance(job_input, Mapping) and "openai_route" in job_input


def parse_openai_call(job: Mapping[str, Any]) -> ImagesCall | None:
    """What a job whose input has an `openai_route` asks for; None: the list of models.

    Raises:
        OpenAIRequestError: with each problem on a line of its own, as `parse_request`.
    """
    job_input = job["input"]
    route = job_input["openai_route"]
    if beside := [name for name in job_input if name in Request.model_fields]:
        raise OpenAIRequestError(
            f"{beside[0]}: does not go beside openai_route: put it into openai_input, or send it "
            "as a job without openai_route"
        )
    if route == MODELS:
        return None
    if route not in (GENERATIONS, EDITS):
        raise OpenAIRequestError(
            f"openai_route: must be one of {', '.join(ROUTES)}; got {shown(route)}"
        )
    given = job_input.get("openai_input")
    if not isinstance(given, Mapping):
        raise OpenAIRequestError(
            f"openai_input: must be an object with a prompt in it; got {shown(given)}"
        )
    try:
        check_extent(given)
    except RequestError as error:
        raise OpenAIRequestError(str(error)) from None
    has_storage = bool(job.get("s3Config"))
    return _parsed(given, is_edit=route == EDITS, has_storage=has_storage)


def _parsed(given: Mapping[Any, Any], *, is_edit: bool, has_storage: bool) -> ImagesCall:
    if is_edit:
        given = {name: _from_form(name, value) for name, value in given.items()}
    given = {name: value for name, value in given.items() if value is not None}
    own = {name: value for name, value in given.items() if name not in ImagesInput.model_fields}
    of_edits = () if is_edit else ("image", "mask")
    openai, lines = _as_far_as_valid(
        {name: given[name] for name in given if name not in own and name not in of_edits}
    )
    lines += [f"{name}: is of {EDITS}; here, send {name}_url" for name in of_edits if name in given]
    words = {
        ours: theirs
        for ours, theirs in IN_OPENAI_WORDS.items()
        if theirs not in of_edits and own.keys().isdisjoint(re.findall(r"\w+", ours))
    }

    def take(name: str, **fields: Any) -> None:
        """A parameter of OpenAI's in place of fields of ours."""
        if any(field in own for field in fields):
            lines.append(f"{name}: is {' and '.join(fields)} here; send this or that")
        own.update(fields)

    if openai.n is not None:
        take("n", num_images=openai.n)
    if openai.size not in (None, "auto"):
        width, height = (int(side) for side in openai.size.lower().split("x"))
        take("size", width=width, height=height)
    if openai.output_compression is not None:
        take("output_compression", output_quality=max(1, openai.output_compression))
    if openai.model is not None and not OPENAI_MODEL.fullmatch(openai.model):
        own["model"] = openai.model
    own["duplicate_first"] = False
    takes_holes = False
    if is_edit:
        how = {"mask", "mask_url", "mask_from_alpha", "mode"}
        takes_holes = how.isdisjoint(given)
        lines += [
            f"{name}: required, {what}; got nothing"
            for name, own_name, what in (
                ("prompt", "prompt", "what to draw"),
                ("image", "image_url", "the picture to edit"),
            )
            if name not in given and own_name not in given
        ]
        # In the place of a picture that is refused already, so that no more is said of it.
        some_picture = "data:image/png;base64,"
        if "image" in given or "image_url" not in given:
            take("image", image_url=openai.image or some_picture)
        if "mask" in given:
            own.setdefault("mask_from_alpha", True)
            take("mask", mask_url=openai.mask or some_picture)
        own.setdefault("mode", "img2img")
    if own.get("check") is True:
        lines.append("check: send it as a job of its own, without openai_route")
        del own["check"]
    if openai.response_format == "b64_json" and own.get("upload_urls"):
        lines.append(
            "upload_urls: of what is uploaded the answer has links: send response_format url"
        )
    try:
        request = parse_request(own)
    except RequestError as error:
        raise OpenAIRequestError(
            "\n".join([*lines, *map(_with_openai_fields, _reworded(str(error), words).split("\n"))])
        ) from None
    if lines:
        raise OpenAIRequestError("\n".join(lines))
    # Where it does not say, whoever sends a place to upload to wants it used.
    wants_links = openai.response_format == "url" or (
        openai.response_format is None and (has_storage or request.upload_urls is not None)
    )
    return ImagesCall(request, openai, words, takes_holes, wants_links)


def _as_far_as_valid(fields: Mapping[str, Any]) -> tuple[ImagesInput, list[str]]:
    """Those that keep their rules, and the problems of the others."""
    try:
        return ImagesInput.model_validate(fields), []
    except ValidationError as error:
        broken = {one["loc"][0] for one in error.errors(include_url=False)}
        valid = {name: value for name, value in fields.items() if name not in broken}
        return ImagesInput.model_validate(valid), problems(error, ImagesInput)


def _from_form(name: object, value: object) -> object:
    """The number, the switch or the list that a form can send as text only."""
    kind = _kinds().get(str(name))
    if kind in (None, "string") or not isinstance(value, str) or len(value) > MAX_FORM_CHARACTERS:
        return value
    try:
        return json.loads(value, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return [value] if kind == "array" else value


@functools.cache
def _kinds() -> dict[str, str | None]:
    schemas = field_schemas(Request) | field_schemas(ImagesInput)
    return {name: schema.get("type") for name, schema in schemas.items()}


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


def _reworded(message: str, words: Mapping[str, str]) -> str:
    """What is OpenAI's are the fields of the call alone: of the objects in it, the fields keep
    their names, and a value of the caller's, in quotes, stays as it is.
    """
    if not words:
        return message
    ours = "|".join(map(re.escape, words))

    def reworded(line: str) -> str:
        kept = f"{OF_OBJECTS}|{OF_AN_OBJECT}" if _is_in_object(line) else OF_OBJECTS
        return re.sub(
            rf'{kept}|(?<!["\w.])(?P<ours>{ours})(?!["\w])',
            lambda found: words[found["ours"]] if found["ours"] else found[0],
            line,
        )

    return "\n".join(map(reworded, message.split("\n")))


def _is_in_object(line: str) -> bool:
    """Whether the line begins with the path of something inside a field. Of the call's own unknown
    fields, the names are in quotes.
    """
    return re.match(r"\w+[.\[]", line) is not None


def _with_openai_fields(line: str) -> str:
    """Of a line on an unknown field of the call: there are OpenAI's, too."""
    if _is_in_object(line):
        return line
    start, fields, rest = line.partition("; the fields are ")
    used = [name for name, kind in _kinds().items() if kind not in (None, "null")]
    return f"{start}{fields}{', '.join(used)}" if rest else line


def list_models(places: Mapping[str, Path]) -> dict[str, Any]:
    """https://platform.openai.com/docs/api-reference/models/list

    Args:
        places: the file or folder of each model, by name.
    """
    return {
        "object": "list",
        "data": [
            {
                "id": name,
                "object": "model",
                "created": _seconds_of(place),
                "owned_by": "sdxl-worker",
            }
            for name, place in places.items()
        ],
    }


def _seconds_of(place: Path) -> int:
    """Of a file's or a folder's last change, in Unix time."""
    try:
        return int(place.stat().st_mtime)
    except OSError:
        return 0
