"""What the Hub and the deployment guide say of the worker: its settings and the cards it fits.

`tools.docs` writes both where they belong; the rest of `.runpod/hub.json` is written by hand.
"""

from dataclasses import dataclass
from typing import Any

from sdxl_worker.placement import fits
from sdxl_worker.settings import Settings

# Base and refiner in float16, with the text encoder, tokenizer and VAE that they share.
WEIGHTS_BYTES = 11_456_729_054
# Bytes in a gigabyte of a card's data sheet. Drivers report more, even with ECC.
GB = 10**9
# Every other setting is under "advanced" in the Hub's form.
PLAIN_SETTINGS = {"MODEL_DIR", "METADATA"}


@dataclass(frozen=True)
class Pool:
    """A pool of the platform, with the memory of each of its cards in GB."""

    name: str
    cards: dict[str, int]

    @property
    def smallest_gb(self) -> int:
        return min(self.cards.values())


# https://docs.runpod.io/references/gpu-types#gpu-pools. The pools of RTX 5090, RTX PRO 6000 and
# B200 are in the documentation of Flash only, so the Hub may not know them.
POOLS = (
    Pool("AMPERE_16", {"RTX 2000 Ada": 16, "A4000": 16, "RTX 4000 Ada": 20, "A4500": 20}),
    Pool("AMPERE_24", {"L4": 24, "A5000": 24, "RTX 3090": 24}),
    Pool("ADA_24", {"RTX 4090": 24}),
    Pool("ADA_32_PRO", {"RTX 5090": 32}),
    Pool("AMPERE_48", {"A40": 48, "A6000": 48}),
    Pool("ADA_48_PRO", {"L40": 48, "L40S": 48, "RTX 6000 Ada": 48}),
    Pool("AMPERE_80", {"A100": 80}),
    Pool("ADA_80_PRO", {"H100": 80}),
    Pool("BLACKWELL_96", {"RTX PRO 6000": 96}),
    Pool("HOPPER_141", {"H200": 141}),
    Pool("BLACKWELL_180", {"B200": 180}),
)

# Not one of `Settings`: the SDK reads it, and crashes if it is empty, so there is a default.
LOG_LEVEL = {
    "key": "RUNPOD_LOG_LEVEL",
    "input": {
        "name": "RUNPOD_LOG_LEVEL",
        "type": "string",
        "description": "What goes into the log. Prompts do at DEBUG only.",
        "options": [
            {"label": level, "value": level} for level in ("DEBUG", "INFO", "WARN", "ERROR")
        ],
        "default": "INFO",
        "advanced": True,
    },
}


def is_resident(memory_gb: int) -> bool:
    """Whether the models stay on a card of that size; otherwise they move there in turn."""
    return fits(WEIGHTS_BYTES, memory_gb * GB)


def gpu_table() -> str:
    rows = ["| pool | cards, with GB | models |", "|---|---|---|"]
    for pool in POOLS:
        cards = ", ".join(f"{card} {gb}" for card, gb in pool.cards.items())
        places = {gb: "resident" if is_resident(gb) else "offloaded" for gb in pool.cards.values()}
        if len(set(places.values())) == 1:
            told = places[pool.smallest_gb]
        else:
            told = ", ".join(f"{gb} GB: {place}" for gb, place in places.items())
        rows.append(f"| `{pool.name}` | {cards} | {told} |")
    return "\n".join(rows)


def env_inputs() -> list[dict[str, Any]]:
    """`config.env` of hub.json: a field of the form for each setting."""
    properties = Settings.model_json_schema()["properties"]
    return [*(_input(name.upper(), schema) for name, schema in properties.items()), LOG_LEVEL]


def _input(key: str, schema: dict[str, Any]) -> dict[str, Any]:
    """One setting as a field of the form.

    A text without a default has none here either: with one, the Hub would send "" in place of
    what the image sets; without one, it leaves out a field that is not filled in.
    """
    given, *_ = schema.get("anyOf", [schema])
    default = schema["default"]
    field: dict[str, Any] = {
        "name": key,
        "type": "string",
        "description": schema["description"].replace("`", ""),
    }
    if "enum" in given:
        values = [*([""] if default is None else []), *given["enum"]]
        field["options"] = [{"label": value or "default", "value": value} for value in values]
        field["default"] = default or ""
    elif given["type"] == "boolean":
        field |= {"type": "boolean", "default": default, "trueValue": "true", "falseValue": "false"}
    else:
        if given["type"] in ("integer", "number"):
            field["type"] = "number"
            bounds = {"min": given.get("minimum"), "max": given.get("maximum")}
            field |= {name: bound for name, bound in bounds.items() if bound is not None}
        if default is not None:
            field["default"] = default
    field["advanced"] = key not in PLAIN_SETTINGS
    return {"key": key, "input": field}
