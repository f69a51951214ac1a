"""The page as one HTML file, which needs no server: `python -m client.one_file > sdxl.html`.

Its content security policy lets exactly this script and this style run, by their hashes.
"""

import base64
import hashlib
import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE_DIR = Path(__file__).resolve().parent / "page"
# In a wheel the schema lies beside this module, in a checkout where `make docs` writes it.
_IN_WHEEL = Path(__file__).resolve().parent / "input.schema.json"
_IN_CHECKOUT = Path(__file__).resolve().parent.parent / "docs" / "input.schema.json"
SCHEMA = _IN_WHEEL if _IN_WHEEL.exists() else _IN_CHECKOUT
INDEX = "index.html"
FILE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

LOOPBACK = "http://127.0.0.1:* http://localhost:*"
ELSEWHERE = {
    # Pictures that were uploaded lie at any address; so may an endpoint.
    "img-src": f"data: blob: https: {LOOPBACK}",
    "connect-src": f"https: {LOOPBACK}",
    "base-uri": "'none'",
    "form-action": "'none'",
}

IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w.]+)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?function\b|class\b|const\b|let\b)", re.MULTILINE)
TOP_LEVEL = re.compile(
    r"^(?:export )?(?:(?:async )?function\*?|class|const|let) (\w+)", re.MULTILINE
)
DESTRUCTURED = re.compile(r"^(?:export )?(?:const|let) [{\[]", re.MULTILINE)
STYLE_LINK = re.compile(r'^ *<link rel="stylesheet" href="([\w.]+)">\n', re.MULTILINE)
SCRIPT_LINK = re.compile(r'^ *<script type="module" src="([\w.]+)"></script>\n', re.MULTILINE)


class PageError(ValueError):
    """The page's files cannot be joined; the message says why."""


def page_files() -> dict[str, Path]:
    """The files that make up the page, by their names."""
    return {path.name: path for path in PAGE_DIR.iterdir() if path.suffix in FILE_TYPES}


def one_file(schema_text: str | None = None) -> str:
    """The whole page as one HTML document.

    Args:
        schema_text: the JSON Schema of a request; None: that of this version.

    Raises:
        PageError: the modules import each other in a circle, or share a name.
    """
    text = _read(INDEX)
    [main] = SCRIPT_LINK.findall(text)
    script = joined_modules(main)
    style = "".join(_read(name) for name in STYLE_LINK.findall(text))
    schema = schema_text or SCHEMA.read_text(encoding="utf-8")
    policy = content_policy(f"'{_hash(script)}'", f"'{_hash(style)}'")
    head = (
        f'    <meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n'
        f"    <style>{style}</style>\n"
        f'    <script type="application/json" id="input-schema">{_compact(schema)}</script>\n'
        f'    <script type="module">{script}</script>\n'
    )
    for ending in ("</style", "</script"):
        if ending in style.lower() or ending in script.lower():
            raise PageError(f"{ending} must not stand in the page's style or script")
    text = SCRIPT_LINK.sub("", STYLE_LINK.sub("", text))
    # The policy stands before all that it is for.
    before, charset, after = text.partition('<meta charset="utf-8">\n')
    return before + charset + head + after


def content_policy(script_source: str, style_source: str, *, is_header: bool = False) -> str:
    """The page's content security policy; in a header it also keeps other pages from framing it."""
    directives = {
        "default-src": "'none'",
        "script-src": script_source,
        "style-src": style_source,
        **ELSEWHERE,
    }
    if is_header:
        for name in ("img-src", "connect-src"):
            directives[name] = f"'self' {directives[name]}"
        directives["frame-ancestors"] = "'none'"
    return "; ".join(f"{name} {sources}" for name, sources in directives.items())


def joined_modules(main: str) -> str:
    """A module and all that it imports as one: what is imported stands before."""
    names: dict[str, str] = {}
    parts = []
    for module in _in_order(main, ()):
        text = _read(module)
        if DESTRUCTURED.search(text):
            raise PageError(f"{module}: a name at the top level that is taken out of an object")
        for name in TOP_LEVEL.findall(text):
            if name in names:
                raise PageError(f"{module}: {name} is a name in {names[name]} as well")
            names[name] = module
        text = EXPORT.sub("", IMPORT.sub("", text))
        if re.search(r"^(import\b.*[\"']|export\b)|\bimport\(", text, re.MULTILINE):
            raise PageError(
                f'{module}: only whole lines `import {{...}} from "./x.js";` can be joined'
            )
        parts.append(text)
    return "\n".join(parts)


def _in_order(module: str, way: tuple[str, ...], done: set[str] | None = None) -> Iterator[str]:
    done = set() if done is None else done
    if module in way:
        raise PageError(f"a circle of imports: {' -> '.join([*way, module])}")
    if module in done:
        return
    for imported in IMPORT.findall(_read(module)):
        yield from _in_order(imported, (*way, module), done)
    done.add(module)
    yield module


def _read(name: str) -> str:
    return (PAGE_DIR / name).read_text(encoding="utf-8")


def _compact(schema_text: str) -> str:
    # In JSON, "<" stands in texts only; escaped, none of them ends the element.
    text = json.dumps(json.loads(schema_text), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
    sys.stdout.write(one_file())
