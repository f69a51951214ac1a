"""Which fields of a request go with which: the rules, in words and as JSON Schema."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from sdxl_worker.field_types import MAX_IMAGES, MAX_PROMPT_CHARACTERS, TEXT_FIELDS
from sdxl_worker.prompt_weights import problem
from sdxl_worker.samplers import SCHEDULE_SPELLINGS, SCHEDULES, SPELLINGS, why_not

# A request's, by name: a tie reads their defaults.
Fields = Mapping[str, FieldInfo]


@dataclass(frozen=True)
class Tie:
    """A rule for a field that makes sense only beside some others, or without some others."""

    field: str
    words: str
    needs: tuple[Mapping[str, Any], ...] = ()
    """One of these has to hold, if there are any: fields and their values, `...` for any, None for
    none."""
    clashes: tuple[Mapping[str, Any], ...] = ()
    """None of these may hold."""

    def is_broken(self, given: Mapping[str, Any], fields: Fields) -> bool:
        return _is_used(self.field, given, fields) and (
            (bool(self.needs) and not any(hold(others, given, fields) for others in self.needs))
            or any(hold(others, given, fields) for others in self.clashes)
        )

    def json_schema(self, fields: Fields) -> dict[str, Any]:
        """What the object has to be if it has the field."""
        kept: list[dict[str, Any]] = [{"not": _held(others, fields)} for others in self.clashes]
        if self.needs:
            kept.append({"anyOf": [_held(others, fields) for others in self.needs]})
        return {"anyOf": [{"not": _held({self.field: ...}, fields)}, {"allOf": kept}]}


def _is_used(name: str, given: Mapping[str, Any], fields: Fields) -> bool:
    """A field that is given as it is by default may stand anywhere: some clients send them all."""
    return given.get(name) not in (None, fields[name].default)


def hold(others: Mapping[str, Any], given: Mapping[str, Any], fields: Fields) -> bool:
    """Whether the fields are given as one of a `Tie`'s `needs` or `clashes` says."""
    return all(
        _is_used(name, given, fields) == (value is not None)
        if value in (..., None)
        else given.get(name) in (value if isinstance(value, tuple) else (value,))
        for name, value in others.items()
    )


def _held(others: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """`hold` as JSON Schema."""
    values = {
        name: {"not": {"const": fields[name].default}}
        if value is ...
        else {"enum": list(value)}
        if isinstance(value, tuple)
        else {"const": value}
        for name, value in others.items()
        if value is not None
    }
    unused = [
        {"not": _held({name: ...}, fields)} for name, value in others.items() if value is None
    ]
    held: dict[str, Any] = {"required": list(values), "properties": values}
    return {**held, "allOf": unused} if unused else held


MASKED: tuple[Mapping[str, Any], ...] = ({"mask_url": ...}, {"mask_from_alpha": ...})
REDRAWN: tuple[Mapping[str, Any], ...] = ({"mode": "img2img"}, *MASKED)
WITH_PICTURE: tuple[Mapping[str, Any], ...] = ({"image_url": ...},)

# What a sampler's name that gives a schedule does not go with: the names of the others.
OTHER_SCHEDULES: tuple[Mapping[str, Any], ...] = tuple(
    {
        "scheduler": tuple(name for name, (_, given) in SPELLINGS.items() if given == schedule),
        "schedule": tuple(name for name, one in SCHEDULE_SPELLINGS.items() if one != schedule),
    }
    for schedule in SCHEDULES
    if any(given == schedule for _, given in SPELLINGS.values())
)

# Which fields go with which. Of a field's broken ties, the first is told.
TIES = (
    Tie("mode", "needs image_url, the picture to start from", WITH_PICTURE),
    Tie("mask_url", "needs image_url, the picture to repaint", WITH_PICTURE),
    Tie("mask_from_alpha", "needs image_url, a picture with transparency", WITH_PICTURE),
    *(
        Tie(
            name,
            "does not go with mode refine; leave mode out, for the base to repaint",
            clashes=({"mode": "refine"},),
        )
        for name in ("mask_url", "mask_from_alpha")
    ),
    *(
        Tie(name, "needs a mask: mask_url, or mask_from_alpha", MASKED)
        for name in ("mask_invert", "mask_blur", "mask_padding")
    ),
    Tie(
        "refiner_strength",
        "needs mode img2img; without it, the refiner's share is strength: send that",
        REDRAWN,
    ),
    Tie(
        "loras",
        "are for the base, and image_url alone is for the refiner: add mode img2img",
        ({"image_url": None}, *REDRAWN),
    ),
    Tie(
        "controlnet",
        "is for the base, and image_url alone is for the refiner: add mode img2img",
        ({"image_url": None}, *REDRAWN),
    ),
    Tie(
        "ip_adapter",
        "is for the base, and image_url alone is for the refiner: add mode img2img",
        ({"image_url": None}, *REDRAWN),
    ),
    Tie(
        "hires",
        "is for the base, and image_url alone is for the refiner: add mode img2img, or take "
        "upscale, which redraws nothing",
        ({"image_url": None}, *REDRAWN),
    ),
    Tie("return_maps", "needs controlnet", ({"controlnet": ...},)),
    Tie(
        "schedule",
        "is another than the one that the scheduler's name gives; leave this out",
        clashes=OTHER_SCHEDULES,
    ),
    Tie(
        "fit",
        "needs image_url and mode (without mode, a picture keeps its size), or controlnet",
        ({"mode": ...}, *MASKED, {"controlnet": ...}),
    ),
)


def broken_ties(given: Mapping[Any, Any], fields: Fields) -> Iterator[tuple[str, str]]:
    """The rules that an input breaks: the field, and the problem in words."""
    if "prompt" not in given and "image_url" not in given:
        yield "prompt", "required, unless image_url is given; got nothing"
    for tie in TIES:
        if tie.is_broken(given, fields):
            yield tie.field, tie.words
    if given.get("prompt_weighting") is True:
        for name in TEXT_FIELDS:
            text = given.get(name)
            if isinstance(text, str) and len(text) <= MAX_PROMPT_CHARACTERS:
                wrong = problem(text)
                if wrong is not None:
                    yield name, wrong
    scheduler = given.get("scheduler")
    no_sampler = why_not(scheduler) if isinstance(scheduler, str) else None
    if no_sampler is not None:
        yield "scheduler", no_sampler
    embeddings = given.get("embeddings")
    if isinstance(embeddings, list):
        tokens = [str(one.get("token")).lower() for one in embeddings if isinstance(one, Mapping)]
        if len(set(tokens)) < len(tokens):
            yield "embeddings", "each needs a token of its own, whatever its capitals"
    urls, num_images = given.get("upload_urls"), given.get("num_images", 1)
    if isinstance(urls, list) and any(urls.count(url) > 1 for url in urls[: MAX_IMAGES + 1]):
        yield "upload_urls", "must all differ, or one picture would overwrite another"
    if isinstance(urls, list) and isinstance(num_images, int) and len(urls) != num_images:
        yield (
            "upload_urls",
            f"must be one address for each of num_images ({num_images}); got {len(urls)}",
        )


def ties_json_schema(fields: Fields) -> dict[str, Any]:
    """`TIES` as JSON Schema's "dependentSchemas"."""
    ties: dict[str, dict[str, Any]] = {}
    for tie in TIES:
        ties.setdefault(tie.field, {"allOf": []})["allOf"].append(tie.json_schema(fields))
    return ties
