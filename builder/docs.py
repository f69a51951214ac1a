"""Writes what is derived from the code: the README's tables and the input's JSON Schema.

Run as `make docs`; a test checks that both are as this writes them.
"""

import json
from pathlib import Path

from sdxl_worker.request import Request, field_schemas, rule
from sdxl_worker.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
SCHEMA = REPOSITORY / "docs" / "input.schema.json"


def input_table() -> str:
    rows = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name, schema in field_schemas().items():
        default = "-" if schema["default"] in (None, "") else f"`{_json(schema['default'])}`"
        rows.append(f"| `{name}` | {rule(name)} | {default} | {schema['description']} |")
    return "\n".join(rows)


def _json(default: object) -> str:
    """As in a request, but for text, which goes without its quotes."""
    return default if isinstance(default, str) else json.dumps(default)


def settings_table() -> str:
    rows = ["| variable | meaning | default |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "-" if field.default is None else f"`{str(field.default).lower()}`"
        rows.append(f"| `{name.upper()}` | {field.description} | {default} |")
    return "\n".join(rows)


def with_tables(readme: str) -> str:
    """The README with the text between its `<!-- name -->` and `<!-- /name -->` made anew."""
    for name, table in {"input": input_table(), "settings": settings_table()}.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, _, rest = readme.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"README.md has no {start!r} ... {end!r}")
        readme = before + start + table + end + after
    return readme


def schema_text() -> str:
    return json.dumps(Request.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    SCHEMA.parent.mkdir(exist_ok=True)
    SCHEMA.write_text(schema_text(), encoding="utf-8")
