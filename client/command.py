"""The command `sdxl`: what is typed, and what comes of it."""

import argparse
import asyncio
import contextlib
import difflib
import importlib.metadata
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from client import picture_files
from client.batch import Batch, Outcome, alone_in, read_items
from client.draw import Delivered, Delivery, JobFailedError, output_of, run_job, save_pictures
from client.endpoint import Endpoint, EndpointError, WrongEndpointError, find_address
from client.options import (
    Field,
    UsageError,
    add_options,
    check,
    fields_of,
    given,
    input_of,
    load_schema,
    named,
    own_names,
    pictures_left_out,
    with_files,
    with_options_named,
)
from client.progress_bar import Display, make_display, printable

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
DISTRIBUTION = "sdxl-worker"
REPOSITORY = Path(__file__).resolve().parent.parent
JOBS, MAX_JOBS = 2, 64
# Python's file names of JPEG, and how requests name the format.
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

EPILOG = """\
endpoint: --endpoint, SDXL_ENDPOINT or RUNPOD_ENDPOINT_ID; otherwise that of `sdxl serve`.
key: SDXL_API_KEY, on Runpod also RUNPOD_API_KEY, or --api-key-file.
exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C cancels the job).
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    fields: Mapping[str, Field] = {}
    typed = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in typed
    warnings.simplefilter("ignore")  # libraries', of files that are told of in other words
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        if typed[:1] == ["serve"]:  # its options are not ours
            return _serve(typed[1:])
        fields = fields_of(load_schema())
        parsed = _parsed(typed, fields)
        return int(parsed.act(parsed, fields))
    except (UsageError, WrongEndpointError) as error:
        return _fail(str(error), WRONG_USAGE, as_json)
    except (EndpointError, JobFailedError) as error:
        return _fail(with_options_named(str(error), fields), FAILED, as_json)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", FAILED, as_json)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _fail("interrupted", INTERRUPTED, as_json)


def _fail(message: str, status: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": message}))
    print(f"sdxl: {printable(message)}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong without a list of all that would be right."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parsed(typed: list[str], fields: Mapping[str, Field]) -> argparse.Namespace:
    parsed, others = _parser(fields).parse_known_args(typed)
    if not others:
        return parsed
    if not others[0].startswith("-"):
        raise UsageError(f"{others[0]!r} is one word too many: put several words in quotes")
    name = others[0].partition("=")[0]
    near = difflib.get_close_matches(name, parsed.parser._option_string_actions, 1)
    hint = f"did you mean {near[0]}?" if near else f"see {parsed.parser.prog} --help"
    raise UsageError(f"{name}: no such option ({hint})")


def _parser(fields: Mapping[str, Field]) -> _Parser:
    parser = _Parser(
        prog="sdxl",
        description="Draw pictures with an SDXL endpoint, on Runpod or on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sdxl {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, act: Any, told: str) -> _Parser:
        made = commands.add_parser(
            name,
            help=told,
            description=told,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(act=act, parser=made)
        return made

    draw = command("draw", _draw, "draw pictures and save them")
    draw.add_argument("text", nargs="?", metavar="PROMPT", help="what to draw, as --prompt")
    _add_common(draw)
    _add_output(draw)
    add_options(draw, fields)

    batch = command("batch", _batch, "draw what a file asks for; what is there is not drawn again")
    batch.add_argument(
        "file",
        help="a prompt on each line; .jsonl: an input on each line; .csv: columns are fields; "
        "- for prompts from stdin",
    )
    _add_common(batch)
    batch.add_argument("--out", metavar="FOLDER", help="default: named after the file")
    batch.add_argument(
        "--jobs", type=int, default=JOBS, metavar="N", help=f"in flight at once (default: {JOBS})"
    )
    _add_saving(batch)
    add_options(batch, fields, without=("prompt",))

    again = command("again", _again, "draw a picture again, from what its file tells")
    again.add_argument("picture", metavar="PICTURE")
    _add_common(again)
    _add_output(again)
    add_options(again, fields)

    show = command("show", _show, "show how a picture was made")
    show.add_argument("picture", metavar="PICTURE")
    show.add_argument("--json", action="store_true", help="as JSON")

    _add_common(command("check", _check, "ask for the report on a worker"))
    # For the help alone: `main` looks for it first.
    command("serve", _serve, "start an endpoint on this machine, from a checkout")
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", metavar="ID|URL")
    parser.add_argument("--api-key-file", metavar="FILE", help="a file with the API key in it")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="cancel a job that takes longer, its wait in the queue included (default: no limit)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", metavar="FILE|JSON|-", help="a request's input, which the options change"
    )
    parser.add_argument(
        "--out", metavar="FILE|FOLDER", help="default: this folder, named after prompt and seed"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    _add_saving(parser)


def _add_saving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--links", action="store_true", help="print links, do not download them")
    parser.add_argument(
        "--as-sent",
        action="store_true",
        help="save files byte for byte as they came, also without the prompts in them",
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0; got {text!r}")


def _draw(parsed: argparse.Namespace, fields: Mapping[str, Field]) -> int:
    job_input = own_names(_base_input(parsed.input), fields) | given(parsed, fields)
    if parsed.text is not None:
        if "prompt" in vars(parsed) and parsed.prompt != parsed.text:
            raise UsageError("--prompt: there is another prompt before it; leave one of them out")
        job_input["prompt"] = parsed.text
    if not any(job_input.get(name) for name in ("prompt", "image_url", "check")):
        raise UsageError('nothing to draw: give a prompt, as in sdxl draw "a red circle"')
    return _drawn(parsed, fields, job_input)


def _again(parsed: argparse.Namespace, fields: Mapping[str, Field]) -> int:
    request = picture_files.request_in(_told(parsed.picture))
    if request is None:
        raise UsageError(f"{parsed.picture}: does not tell how it was made")
    changes = own_names(_base_input(parsed.input), fields) | given(parsed, fields)
    # Whoever made the file does not choose which files of this machine are sent.
    for place in pictures_left_out(request, fields, without=changes):
        option, _, inside = named(place).partition("[")
        how = f"{option} FILE"
        if inside:
            how = f"{option} once more, all of it, with {inside.rpartition('.')[2]}=FILE"
        raise UsageError(
            f"{named(place)}: the picture was made from another one, which its file does not hold: "
            f"give it with {how}"
        )
    job_input = request | changes
    if not any(job_input.get(name) for name in ("prompt", "image_url")):
        raise UsageError(
            f"{parsed.picture}: was made where files do not tell the prompts; give them with "
            "--prompt and --negative-prompt"
        )
    return _drawn(parsed, fields, job_input)


def _check(parsed: argparse.Namespace, _: Mapping[str, Field]) -> int:
    display = make_display(quiet=parsed.quiet, preview=False)

    async def work(endpoint: Endpoint) -> dict[str, Any]:
        answer = await run_job(endpoint, {"check": True}, display, timeout_seconds=parsed.timeout)
        return output_of(answer)

    print(json.dumps(_at_endpoint(parsed, display, work), indent=2))
    return 0


def _drawn(
    parsed: argparse.Namespace, fields: Mapping[str, Field], job_input: dict[str, Any]
) -> int:
    """Send the job, save what comes and print where it is."""
    folder, name = _place(parsed.out)
    if name and "output_format" in fields:
        job_input.setdefault("output_format", FORMATS[Path(name).suffix.lower()])
    sent = with_files(job_input, fields)
    check(sent, fields)
    display = make_display(quiet=parsed.quiet, preview=getattr(parsed, "preview", None))
    if "preview" in fields and display.shows_pictures:
        sent.setdefault("preview", True)
    _make_folder(folder)

    def place(i: int, count: int, suffix: str, seed: int) -> Path:
        stem = f"{picture_files.slug(str(job_input.get('prompt') or 'picture'))}-seed{seed}"
        if name:
            stem = Path(name).stem if count == 1 else f"{Path(name).stem}-{i + 1}"
            # Another format than asked for (`on_too_large`) is not named as that one.
            if FORMATS[Path(name).suffix.lower()] == FORMATS[suffix]:
                suffix = Path(name).suffix
        return folder / f"{stem}{suffix}"

    delivery = Delivery(
        place=place, overwrite=parsed.force, links=parsed.links, as_sent=parsed.as_sent
    )

    async def work(endpoint: Endpoint) -> dict[str, Any]:
        answer = await run_job(endpoint, sent, display, timeout_seconds=parsed.timeout)
        output = output_of(answer)
        told = {name: answer.get(name) for name in ("id", "status", "delayTime", "executionTime")}
        if "images" not in output and "image_url" not in output:  # a report
            return {**told, "output": output}
        try:
            delivered = await save_pictures(endpoint, output, sent, delivery)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; the endpoint keeps the answer of job {answer.get('id')} for 30 "
                "minutes",
                str(error.filename or folder),
            ) from None
        beside: dict[str, Any] = {
            name: output[name] for name in ("seed", "warning") if name in output
        }
        for line in delivered.flagged:
            display.say(line)
        return {**told, **beside, **_told_of(delivered)}

    result = _at_endpoint(parsed, display, work)
    if result.get("warning"):
        display.say(f"Warning: {result['warning']}")
    if parsed.json:
        print(json.dumps(result))
    elif "output" in result:
        print(json.dumps(result["output"], indent=2))
    else:
        _print_lines([*result["files"], *result["links"], *result["maps"]])
    return 0


def _batch(parsed: argparse.Namespace, fields: Mapping[str, Field]) -> int:
    if not 1 <= parsed.jobs <= MAX_JOBS:
        raise UsageError(f"--jobs: must be an integer from 1 to {MAX_JOBS}; got {parsed.jobs}")
    source = Path(parsed.file)
    text = _text_of(parsed.file)
    kind = "" if parsed.file == "-" else source.suffix.lower()
    items, repeated = read_items(text, kind, given(parsed, fields), fields)
    if not items:
        raise UsageError(f"{parsed.file}: there is nothing to draw in it")
    folder = Path(parsed.out or ("pictures" if parsed.file == "-" else source.stem))
    if parsed.out is None and folder.exists() and not folder.is_dir():
        folder = Path(f"{folder}-pictures")
    _make_folder(folder)
    display = make_display(quiet=parsed.quiet, preview=False)
    if repeated:
        display.note(f"Lines that ask for the same as another one, left out: {repeated}")

    async def work(endpoint: Endpoint) -> Outcome:
        batch = Batch(
            endpoint,
            folder,
            fields,
            display,
            timeout_seconds=parsed.timeout,
            links=parsed.links,
            as_sent=parsed.as_sent,
        )
        try:
            return await batch.run(items, parsed.jobs)
        except asyncio.CancelledError:
            done = sum(batch.is_done(item) for item in items)
            display.say(f"{done} of {len(items)} are done; the same command goes on from there.")
            raise

    with alone_in(folder):
        outcome = _at_endpoint(parsed, display, work)
    if parsed.json:
        print(
            json.dumps(
                {
                    **_told_of(outcome),
                    "there_before": outcome.there_before,
                    "failed": outcome.failed,
                }
            )
        )
    else:
        _print_lines([*map(str, outcome.files), *outcome.links, *map(str, outcome.maps)])
    if outcome.failed:
        display.say(
            f"{len(outcome.failed)} of {len(items)} failed; the same command tries them again:"
        )
        for name, error in outcome.failed.items():
            display.say(f"  {name}: {error}")
    return FAILED if outcome.failed else 0


def _told_of(made: Delivered | Outcome) -> dict[str, Any]:
    return {
        "files": [str(path) for path in made.files],
        "links": made.links,
        "maps": [str(path) for path in made.maps],
        **({"nsfw": made.nsfw} if made.nsfw else {}),
    }


def _show(parsed: argparse.Namespace, _: Mapping[str, Field]) -> int:
    told = _told(parsed.picture)
    values: dict[str, Any] = {}
    for name, text in told.items():
        values[name] = text
        with contextlib.suppress(ValueError, RecursionError):
            parsed_value = json.loads(text)
            values[name] = parsed_value if isinstance(parsed_value, dict) else text
    if parsed.json:
        print(json.dumps({"file": parsed.picture, **values}))
        return 0
    if not values:
        raise UsageError(f"{parsed.picture}: does not tell how it was made")
    for name, value in values.items():
        if name == picture_files.REQUEST and isinstance(value, dict):
            _print_lines(f"{key}: {_text(one)}" for key, one in value.items())
        # Beside a request, the infotext is the same once more.
        elif name != picture_files.INFOTEXT or picture_files.REQUEST not in values:
            _print_lines([f"{name}: {_text(value)}"])
    return 0


def _serve(arguments: list[str], *_: Any) -> int:
    """Become `python -m local_endpoint`, which has all that is typed."""
    if not (REPOSITORY / "local_endpoint" / "__main__.py").is_file():
        raise UsageError(
            "serve: the endpoint is not a part of the installed command; run it from a checkout of "
            "the repository, or `make endpoint` there"
        )
    os.chdir(REPOSITORY)
    os.execv(sys.executable, [sys.executable, "-m", "local_endpoint", *arguments])  # noqa: S606


def _at_endpoint(parsed: argparse.Namespace, display: Display, work: Any) -> Any:
    """What `work` returns; Ctrl-C and SIGTERM cancel it, a second one ends the command at once."""
    address = find_address(parsed.endpoint, parsed.api_key_file)
    told: list[str] = []

    def trouble(text: str) -> None:
        if told[-1:] != [text]:
            told.append(text)
            display.note(f"{text}; trying again")

    async def call() -> Any:
        async with Endpoint(address, trouble) as endpoint:
            try:
                return await work(endpoint)
            except WrongEndpointError as error:  # known only now: that is no wrong usage
                raise EndpointError(str(error)) from None

    with display:
        return asyncio.run(_until_signal(call(), display))


async def _until_signal(call: Coroutine[Any, Any, Any], display: Display) -> Any:
    loop = asyncio.get_running_loop()
    working = asyncio.ensure_future(call)
    is_asked = False

    def stop() -> None:
        nonlocal is_asked
        if is_asked:
            display.close()  # the cursor is hidden
            os._exit(INTERRUPTED)
        is_asked = True
        display.say("Cancelling; once more to end at once.")
        working.cancel()

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        # Nothing is left open here: Windows has no SIGHUP, and its loops take no handlers, which
        # they say with this error. There, asyncio itself makes Ctrl-C the same cancellation.
        with contextlib.suppress(NotImplementedError, AttributeError):
            loop.add_signal_handler(getattr(signal, name), stop)
    try:
        result = await working
    except (EndpointError, JobFailedError) as error:
        if is_asked:
            display.say(str(error))
            raise asyncio.CancelledError from None
        raise
    return result


def _base_input(value: str | None) -> dict[str, Any]:
    if value is None:
        return {}
    text = value if value.lstrip().startswith("{") else _text_of(value)
    try:
        return input_of(text)
    except UsageError as error:
        raise UsageError(f"--input: {error}") from None


def _text_of(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.read()
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{file}: cannot be read: {reason}") from None


def _told(file: str) -> dict[str, str]:
    try:
        return picture_files.read(Path(file).expanduser().read_bytes())
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    except picture_files.PictureError as error:
        raise UsageError(f"{file}: {error}") from None


def _place(out: str | None) -> tuple[Path, str | None]:
    """The folder and the file's name, which is None where it is to be made up."""
    if out is None:
        return Path(), None
    path = Path(out).expanduser()
    if path.is_dir() or out.endswith(os.sep) or not path.suffix:
        return path, None
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--out: must be a folder, or a file that ends in {', '.join(FORMATS)}")
    return path.parent, path.name


def _make_folder(folder: Path) -> None:
    """Before anything is drawn: a picture that cannot be saved is paid for as well."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"--out: {folder} cannot be written to")
    except OSError as error:
        raise UsageError(f"--out: {folder} cannot be made: {error.strerror}") from None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line))
