"""What had to be tried again since the worker started, for a check's report: the first sign of
weights, a number format or a card that do not fit."""

import logging
from collections import Counter

log = logging.getLogger(__name__)

COUNTS: Counter[str] = Counter()


def note(what: str) -> None:
    COUNTS[what] += 1
    log.warning("second try: %s", what)
