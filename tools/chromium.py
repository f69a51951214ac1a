"""The system's Chromium, or Playwright's own, for the page's tests and screenshots."""

import os
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
HOW_TO_INSTALL = (
    "Chromium is missing: `apt-get install chromium` or `python -m playwright install chromium`; "
    "or set CHROMIUM to its path"
)
ARGUMENTS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    # Nothing is fetched from elsewhere, whatever a page asks for.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class ChromiumMissingError(Exception):
    """The message says what to install."""


def launch(playwright: Playwright) -> Browser:
    """A headless Chromium: $CHROMIUM, or else one on PATH, or else Playwright's own.

    It runs without a sandbox, which root could not have: open only pages of this repository.

    Raises:
        ChromiumMissingError: there is none.
    """
    named = os.environ.get("CHROMIUM")
    candidates = [named] if named else [*NAMES, playwright.chromium.executable_path]
    path = next(filter(None, map(shutil.which, candidates)), None)
    if path is None:
        raise ChromiumMissingError(HOW_TO_INSTALL)
    return playwright.chromium.launch(
        executable_path=Path(path), args=ARGUMENTS, chromium_sandbox=False
    )
