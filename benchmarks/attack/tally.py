"""What held and what broke, by kind of attack: the table, the JSON, and what an answer must be."""

import base64
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import common

MESSAGE_MAX_BYTES = 8000
BREAKS_SHOWN = 20
REPOSITORY = Path(__file__).resolve().parents[2]
# What belongs into a log: traces of the program, its machine and its libraries.
INNARDS = re.compile(
    r"Traceback|File \"|object at 0x|site-packages|\[?Errno|HTTPS?Connection|urllib3|pydantic"
    r"|input_value|the worker failed at this job|" + re.escape(str(REPOSITORY))
)


@dataclass
class Tally:
    """The outcome of one kind of attack."""

    kind: str
    tried: int = 0
    breaks: list[str] = field(default_factory=list)
    """One line for each input that was not held: what it was and what happened."""
    figures: dict[str, float] = field(default_factory=dict)
    """What was measured on the way."""
    tick: Callable[[], object] = lambda: None
    """Called after each input: the progress bar."""

    def add(self, what: str, complaint: str | None) -> None:
        """One input was tried; `complaint` says what broke, or is None where all held."""
        self.tried += 1
        if complaint is not None:
            self.breaks.append(f"{what}: {complaint}")
        self.tick()

    def raise_to(self, figure: str, value: float) -> None:
        """Keep the highest value of a figure."""
        self.figures[figure] = round(max(value, self.figures.get(figure, 0)), 1)

    @property
    def held(self) -> int:
        return self.tried - len(self.breaks)


def unreadable(message: object) -> str | None:
    """What is wrong with a message for a caller, if anything is."""
    if not isinstance(message, str) or not message.strip():
        return f"not a message but {message!r:.200}"
    try:
        size = len(message.encode())
    except UnicodeEncodeError:
        return "a message that cannot be encoded"
    if size > MESSAGE_MAX_BYTES:
        return f"a message of {size} bytes"
    if found := INNARDS.search(message):
        return f"the message tells of {found[0]!r}: {message:.300}"
    return None


def unreadable_answer(answer: Mapping[str, Any], *must_be: str, asked: object = None) -> str | None:
    """What is wrong with the platform's answer about a job that has ended, if anything is.

    Args:
        must_be: statuses; none given: COMPLETED with a result, or FAILED with a message.
        asked: the job's input, which a result has to answer. None: any result will do.
    """
    status = answer["status"]
    if status not in (must_be or ("COMPLETED", "FAILED")):
        return f"{status} {answer.get('error', '')!s:.300}".strip()
    if status == "FAILED":
        return unreadable(answer.get("error"))
    if status == "COMPLETED" and not isinstance(answer.get("output"), dict):
        return f"COMPLETED with {answer.get('output')!r:.200}"
    if status == "COMPLETED" and isinstance(asked, dict) and not asked.get("check"):
        return wrong_output(answer["output"], asked)
    return None


def wrong_output(output: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """What is wrong with an output, which should hold the pictures that were asked for."""
    images = output.get("images")
    count = asked.get("num_images") or 1
    if not isinstance(images, list) or len(images) != count:
        return f"not {count} pictures but {images!r:.100}"
    warning = output.get("warning")
    if warning is not None and (complaint := unreadable(warning)):
        return f"a warning that is {complaint}"
    links = [image for image in images if image.startswith("http")]
    if asked.get("upload_urls") and len(links) < count and warning is None:
        return f"{len(links)} of {count} pictures uploaded, without a warning"
    if links and not asked.get("upload_urls"):
        return f"a link that nobody asked for: {links[0]:.100}"
    for image in images:
        if image not in links and (complaint := _wrong_picture(image, asked, warning)):
            return complaint
    is_twice = asked.get("duplicate_first") is not False or images[0] in links
    first = output.get("image_url")
    if first != (images[0] if is_twice else None):
        return f"image_url is {first!r:.100}"
    return None


def _wrong_picture(uri: str, asked: Mapping[str, Any], warning: str | None) -> str | None:
    head, _, payload = uri.partition(",")
    wanted = asked.get("output_format") or "png"
    try:
        with Image.open(io.BytesIO(base64.b64decode(payload, validate=True))) as picture:
            picture.load()
            kind = str(picture.format).lower()
    except (OSError, ValueError) as error:
        return f"a picture that cannot be read: {head:.100}, {error}"
    if head != f"data:image/{kind};base64":
        return f"{kind} as {head:.100}"
    if kind == wanted or (kind == "jpeg" and asked.get("on_too_large") == "jpeg" and warning):
        return None
    return f"{kind} in place of {wanted}"


def table(tallies: list[Tally]) -> str:
    rows = [
        (one.kind, f"{one.tried:,}", f"{one.held:,}", f"{len(one.breaks):,}") for one in tallies
    ]
    return common.markdown_table([("kind", "inputs tried", "held", "broke"), *rows])


def write(tallies: list[Tally], path: Path, seed: int) -> None:
    kinds = [
        {
            "kind": one.kind,
            "tried": one.tried,
            "held": one.held,
            "broke": len(one.breaks),
            **({"figures": one.figures} if one.figures else {}),
            "breaks": one.breaks[:BREAKS_SHOWN],
        }
        for one in tallies
    ]
    result = {**common.machine(), "seed": seed, "kinds": kinds}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
