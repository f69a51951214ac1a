"""The prompt syntax of A1111: a weight for each piece of a text, and where a new chunk begins.

    (x)      x weighs 1.1 times as much        (x:1.5)  1.5 times
    [x]      x weighs 1 / 1.1 times as much    BREAK    what follows stands in a new chunk

Brackets in brackets multiply. One that is never closed reaches to the end, one that closes nothing
is text, and so is one after a backslash. (The examples of `parse_prompt_attention` in A1111's
modules/prompt_parser.py say the same; the tests have them.) `<lora:name:1>` and the like are no
text for the model.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

# What a bracket multiplies by.
FACTORS = {"(": 1.1, "[": 1 / 1.1}
# Far more than pictures can bear, and little enough for the hidden states to stay finite.
MAX_WEIGHT = 10.0

# Each alternative is found in time linear in what it looks at, also where it fails.
_ITEM = re.compile(
    r"\\(?P<literal>[\\()\[\]]?)"
    r"|(?P<opened>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)"
    r"|(?P<closed>[)\]])"
    r"|[^\\()\[\]:]+|:"
)
_BREAK = re.compile(r"\bBREAK\b")
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Piece:
    text: str
    weight: float = 1.0


def names_networks(text: str) -> bool:
    """Whether there is a `<lora:...>` or the like in it."""
    return _NETWORK.search(text) is not None


def problem(text: str) -> str | None:
    """What is wrong with a text's weights, in words."""
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return None


def parse(text: str) -> list[list[Piece]]:
    """The pieces of a text between one BREAK and the next.

    Raises:
        ValueError: a weight is beyond `MAX_WEIGHT`; the message says which.
    """
    parts: list[list[Piece]] = [[]]
    weighted = _weighted(_NETWORK.sub("", text))
    for is_break, run in itertools.groupby(weighted, key=lambda piece: piece is None):
        if is_break:
            parts.append([])
            continue
        pieces_of_run = filter(None, run)
        for weight, pieces in itertools.groupby(pieces_of_run, key=lambda piece: piece.weight):
            parts[-1].append(Piece("".join(piece.text for piece in pieces), weight))
    return parts


@dataclass
class _Opened:
    kind: str
    factor: float


@dataclass
class _Closed:
    kind: str


def _weighted(text: str) -> Iterator[Piece | None]:
    """Its pieces, as they come; None for BREAK."""
    # Those of one kind lie within each other; those of different kinds may overlap.
    products = {kind: [1.0] for kind in FACTORS}
    for item in _items(text):
        if isinstance(item, _Opened):
            products[item.kind].append(products[item.kind][-1] * item.factor)
        elif isinstance(item, _Closed):
            products[item.kind].pop()
        elif item is None:
            yield None
        elif item:
            weight = products["("][-1] * products["["][-1]
            # Also if so many brackets made it no number any more.
            if not abs(weight) <= MAX_WEIGHT:
                raise ValueError(
                    f"weight {weight:g}, all brackets around it together, is too far from 1; "
                    f"give words weights from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
                )
            yield Piece(item, weight)


def _items(text: str) -> list[_Opened | _Closed | str | None]:
    """Text, brackets that count, and None for BREAK."""
    items: list[_Opened | _Closed | str | None] = []
    still_open: dict[str, list[_Opened]] = {kind: [] for kind in FACTORS}
    for match in _ITEM.finditer(text):
        literal, weight = match["literal"], match["weight"]
        closed = {")": "(", "]": "["}.get(match["closed"] or "")
        if weight is not None:
            closed = "("
        if literal is not None:
            items.append(literal)
        elif kind := match["opened"]:
            opened = _Opened(kind, FACTORS[kind])
            items.append(opened)
            still_open[kind].append(opened)
        elif closed and still_open[closed]:
            opened = still_open[closed].pop()
            if weight is not None:
                opened.factor = float(weight)
            items.append(_Closed(closed))
        else:
            first, *others = _BREAK.split(match[0])
            items.append(first)
            for other in others:
                items += [None, other]
    return items
