"""What must not happen while a page is open: noted in the browser, judged when a test ends."""

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext

# A policy's violations reach the console for some directives only; the event comes for all.
TELL_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) =>
    console.error(`content security policy: ${event.violatedDirective} ${event.blockedURI}`));
"""


@dataclass
class Watch:
    """The errors of all pages of the contexts that it watches, and their requests."""

    origins: set[str] = field(default_factory=set)  # a request to any other is a problem
    expected: list[str] = field(default_factory=list)  # patterns of problems that a test causes
    requests: list[str] = field(default_factory=list)  # all addresses, in order
    _problems: list[str] = field(default_factory=list)

    def over(self, context: BrowserContext) -> None:
        context.add_init_script(TELL_VIOLATIONS)
        context.on("request", lambda request: self._note_request(request.url))
        context.on(
            "page",
            lambda page: page.on("websocket", lambda socket: self._note_request(socket.url)),
        )
        context.on("weberror", lambda error: self._problems.append(f"uncaught: {error.error}"))
        context.on(
            "console",
            lambda message: (
                self._problems.append(f"console: {message.text} ({message.location['url']})")
                if message.type == "error"
                else None
            ),
        )

    def problems(self) -> list[str]:
        """Those that the test did not expect."""
        return [
            problem
            for problem in self._problems
            if not any(re.search(pattern, problem) for pattern in self.expected)
        ]

    def _note_request(self, url: str) -> None:
        self.requests.append(url)
        if urlsplit(url).scheme not in ("data", "blob") and origin(url) not in self.origins:
            self._problems.append(f"a request to elsewhere: {url}")


def origin(url: str) -> str:
    """Of a file: its whole address."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}" if parts.netloc else url
