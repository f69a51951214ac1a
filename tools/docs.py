"""Writes what is derived from the code: the documents' tables, the input's JSON Schema, the
settings in the Hub's form, what the attack, the long run and benchmarks told, and the names of the
publisher and of the image.

Run as `make docs`; a test checks that all of it is up to date.
"""

import csv
import json
import re
import statistics
from pathlib import Path

import sdxl_worker
from sdxl_worker.few_step import recognise
from sdxl_worker.openai_images import LEVELS, ImagesInput
from sdxl_worker.request import Request
from sdxl_worker.samplers import NEAREST, SAMPLERS, SCHEDULES
from sdxl_worker.settings import Settings
from sdxl_worker.wording import field_schemas, rule
from tools.hub import env_inputs, gpu_table
from tools.publisher import image, publisher

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
CHANGELOG = REPOSITORY / "CHANGELOG.md"
MODELS = REPOSITORY / "docs" / "models.md"
SAMPLERS_DOCUMENT = REPOSITORY / "docs" / "samplers.md"
OPENAI = REPOSITORY / "docs" / "openai.md"
DEPLOY = REPOSITORY / "docs" / "deploy.md"
PLATFORM = REPOSITORY / "docs" / "platform.md"
SECURITY = REPOSITORY / "SECURITY.md"
COMPOSE = REPOSITORY / "docker-compose.yml"
ISSUE_CONFIG = REPOSITORY / ".github" / "ISSUE_TEMPLATE" / "config.yml"
SCHEMA = REPOSITORY / "docs" / "input.schema.json"
HUB = REPOSITORY / ".runpod" / "hub.json"
LONG_RUN = REPOSITORY / "benchmarks" / "results" / "long_run.json"
FORMATS = REPOSITORY / "benchmarks" / "results" / "formats.json"
ATTACK = REPOSITORY / "benchmarks" / "results" / "attack.json"
ADAPTERS = REPOSITORY / "benchmarks" / "results" / "adapters-cpu.json"
LORA = REPOSITORY / "docs" / "lora.md"
SWAP = REPOSITORY / "benchmarks" / "results" / "swap-cpu.json"
UPLOADING = REPOSITORY / "benchmarks" / "results" / "uploading.json"
THROUGHPUT = REPOSITORY / "benchmarks" / "results" / "throughput.csv"


def input_table() -> str:
    rows = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name, schema in field_schemas(Request).items():
        default = "-" if schema["default"] in (None, "") else f"`{_json(schema['default'])}`"
        rows.append(f"| `{name}` | {rule(schema)} | {default} | {schema['description']} |")
    return "\n".join(rows)


def _json(default: object) -> str:
    """As in a request, but text has no quotes."""
    return default if isinstance(default, str) else json.dumps(default)


def openai_table() -> str:
    rows = ["| parameter | value | what becomes of it |", "|---|---|---|"]
    for name, schema in field_schemas(ImagesInput).items():
        rows.append(f"| `{name}` | {rule(schema)} | {schema['description']} |")
    return "\n".join(rows)


def quality_table() -> str:
    rows = ["| `quality` | steps of the base | the refiner |", "|---|---|---|"]
    for level in dict.fromkeys(LEVELS.values()):
        names = ", ".join(f"`{name}`" for name, one in LEVELS.items() if one == level)
        steps = level.steps or f"{Request.model_fields['num_inference_steps'].default}, the default"
        rows.append(f"| {names} | {steps} | {'as without' if level.is_refined else 'off'} |")
    return "\n".join(rows)


def settings_table() -> str:
    rows = ["| variable | meaning | default |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "-" if field.default is None else f"`{str(field.default).lower()}`"
        rows.append(f"| `{name.upper()}` | {field.description} | {default} |")
    return "\n".join(rows)


def samplers_table() -> str:
    rows = ["| name | other names | schedules | |", "|---|---|---|---|"]
    for name, sampler in SAMPLERS.items():
        others = [other for other in sampler.spellings if other != name]
        others += sampler.combined
        told = ", ".join(f"`{other}`" for other in others)
        marks = [
            *(["adds noise in its steps"] if sampler.adds_noise else []),
            *(["two calls of the UNet in a step"] if sampler.calls_per_step == 2 else []),
            *([] if sampler.zero_terminal_snr else ["not from pure noise"]),
        ]
        schedules = ", ".join(sampler.schedules)
        rows.append(f"| `{name}` | {told} | {schedules} | {'; '.join(marks)} |")
    return "\n".join(rows)


def nearest_table() -> str:
    rows = ["| not there | nearest |", "|---|---|"]
    for name in dict.fromkeys(NEAREST.values()):
        others = ", ".join(f"`{other}`" for other, nearest in NEAREST.items() if nearest == name)
        rows.append(f"| {others} | `{name}` |")
    return "\n".join(rows)


# One published file for each of the settings that there are.
FEW_STEP_FILES = (
    "sdxl_lightning_4step_lora",
    "Hyper-SDXL-4steps-lora",
    "Hyper-SDXL-8steps-CFG-lora",
    "Hyper-SDXL-1step-lora",
    "Hyper-SDXL-1step-Unet",
    "lcm-lora-sdxl",
    "TCD-SDXL-LoRA",
    "dmd2_sdxl_4step_lora",
    "dmd2_sdxl_1step_unet",
    "sd_xl_turbo_1.0",
    "pcm_sdxl_smallcfg_4step_converted",
    "pcm_sdxl_normalcfg_4step_converted",
    "pcm_sdxl_lcmlike_lora_converted",
    "sdxl-flash",
)


def few_step_table() -> str:
    rows = [
        "| file, for example | sampler, schedule | steps | guidance | |",
        "|---|---|---|---|---|",
    ]
    for file in FEW_STEP_FILES:
        found = recognise(file, None, {})
        if found is None:
            raise ValueError(f"{file} is not recognised")
        least, most = found.takes_steps
        steps = f"{found.steps}" + (f", made for {least} to {most}" if least != most else "")
        guidance = "off" if found.guidance_scale <= 1 else f"{found.guidance_scale:g}"
        marks = [
            *([f"eta {found.eta:g}"] if found.eta is not None else []),
            *([f"timesteps {', '.join(map(str, found.timesteps))}"] if found.timesteps else []),
            *([f"made for {found.native_size_px} px"] if found.native_size_px else []),
        ]
        rows.append(
            f"| `{file}` | `{found.scheduler}`, {found.schedule} | {steps} | {guidance} | "
            f"{'; '.join(marks)} |"
        )
    return "\n".join(rows)


def schedules_table() -> str:
    rows = ["| name | other names | spacing |", "|---|---|---|"]
    for name, schedule in SCHEDULES.items():
        others = ", ".join(f"`{other}`" for other in schedule.spellings)
        rows.append(f"| `{name}` | {others} | {schedule.meaning} |")
    return "\n".join(rows)


def with_tables(document: Path, **tables: str) -> str:
    """The document with the text between its `<!-- name -->` and `<!-- /name -->` made anew."""
    text = document.read_text(encoding="utf-8")
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{document.name} has no {start!r} ... {end!r}")
        text = before + start + table + end + after
    return text


def listing() -> str:
    name = publisher()
    url = f"https://console.runpod.io/hub/{name}"
    return (
        f"**Today the Hub's [listing of `{name}`]({url}) deploys the old worker, 2.1.0.** It "
        "deploys this one\nonce a release of this repository is published under that name. Until "
        "then, [build your own image](docs/deploy.md#your-own-build).\n\n"
        f"[![Runpod](https://api.runpod.io/badge/{name})]({url})"
    )


def report_url() -> str:
    return f"https://github.com/{publisher()}/security/advisories/new"


def report() -> str:
    return f"Report it privately: [Report a vulnerability]({report_url()})."


def tagged_image() -> str:
    """Of the release of this version, as the workflow tags it."""
    return f"{image()}:v{sdxl_worker.__version__}"


def images() -> str:
    """Whether there is an image yet is told by the changelog's first heading."""
    changelog = CHANGELOG.read_text(encoding="utf-8")
    released = "(not released yet)" not in changelog.partition("\n## ")[2].partition("\n")[0]
    there = (
        "" if released else f" **There is none yet: {sdxl_worker.__version__} is not released.**"
    )
    return (
        f"A release pushes `{tagged_image()}`, with SDXL 1.0 in it,\nand moves `latest` to it."
        f"{there}"
    )


def with_value(document: Path, key: str, value: str) -> str:
    """The YAML document with that value of the one key that ends with "# `make docs`"."""
    text = document.read_text(encoding="utf-8")
    changed, count = re.subn(rf"({key}: )\S+(  # `make docs`)", rf"\g<1>{value}\g<2>", text)
    if count != 1:
        raise ValueError(f"{document.name} has not one {key} that `make docs` writes")
    return changed


def attack_table() -> str:
    """What `make attack` told when it was run last."""
    rows = ["| kind | inputs tried | held |", "|---|---|---|"]
    for one in json.loads(ATTACK.read_text(encoding="utf-8"))["kinds"]:
        rows.append(f"| {one['kind']} | {one['tried']:,} | {one['held']:,} |")
    return "\n".join(rows)


def long_run() -> str:
    """What `make long-run` told when it was run last."""
    run = json.loads(LONG_RUN.read_text(encoding="utf-8"))
    lost, doubled, wrong = (len(run[name]) for name in ("lost", "doubled", "wrong"))
    return (
        f"`make long-run`: {run['jobs']:,} jobs of every kind through three workers, which were "
        f"killed {run['killed']} times, on a\nplatform that answers badly one time in ten "
        f"({run['faults']:,} times): {lost} lost, {doubled} doubled, {wrong} answered wrongly. "
        f"Of {run['repeated']:,} that\nasked the same again between LoRAs and other models, "
        f"{len(run['changed'])} differed in a bit. The memory of a worker that lived through it\n"
        f"grew by {run['growth']:.1%} from job {run['settled_after']} on "
        "([chart](docs/platform.md#long-runs))."
    )


def formats_table() -> str:
    """What `benchmarks.formats` told when it was run last."""
    rows = [
        "| format and quality | bytes | of PNG | encoding, of PNG's time | PSNR |",
        "|---|---|---|---|---|",
    ]
    formats = json.loads(FORMATS.read_text(encoding="utf-8"))["formats"]
    for one in formats:
        share = one["bytes"] / formats[0]["bytes"]
        psnr = "exact" if one["psnr_db"] == 99 else f"{one['psnr_db']:.1f} dB"
        rows.append(
            f"| {one['format']} | {one['bytes']:,} | {share:.0%} | {one['times_png']:g} | {psnr} |"
        )
    return "\n".join(rows)


ANSWERED_FORMATS = ("PNG", "WebP 100, lossless", "JPEG 95", "JPEG 80", "WebP 90")


def answers_table() -> str:
    """MB of an answer by `num_images`, with the first picture once and twice."""
    answers = json.loads(FORMATS.read_text(encoding="utf-8"))["answers"]
    size = {(one["format"], one["num_images"], one["duplicate_first"]): one for one in answers}
    rows = [
        f"| `num_images` | {' | '.join(ANSWERED_FORMATS)} |",
        "|---" * (1 + len(ANSWERED_FORMATS)) + "|",
    ]
    for count in sorted({one["num_images"] for one in answers}):
        cells = [
            " / ".join(_megabytes(size[name, count, twice]["bytes"]) for twice in (True, False))
            for name in ANSWERED_FORMATS
        ]
        rows.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _megabytes(size: int) -> str:
    """Bold, where it is too large for /run."""
    told = f"{size / 1e6:.1f}"
    return f"**{told}**" if size > 10_000_000 else told


def uploading_table() -> str:
    """What `benchmarks.uploading` told when it was run last."""
    run = json.loads(UPLOADING.read_text(encoding="utf-8"))
    rows = ["| pictures | jobs a minute | from take to result, median |", "|---|---|---|"]
    kinds = {"inline": "in the answer", "uploaded": f"uploaded, {run['upload_s']:g} s each"}
    for kind, words in kinds.items():
        row = run[kind]
        rows.append(f"| {words} | {row['jobs_per_minute']:.0f} | {row['execution_s']:.1f} s |")
    added = (run["uploaded"]["seconds"] - run["inline"]["seconds"]) / run["jobs"]
    return "\n".join(
        [
            *rows,
            "",
            f"{run['jobs']} jobs sent at once to one worker, with the miniature model: uploading "
            f"added {added:.2f} s to each, the last\none's upload, for which no other job waits, "
            "included.",
        ]
    )


def throughput_tables() -> str:
    """What `benchmarks.throughput` told when it was run last."""
    with THROUGHPUT.open(newline="") as file:
        run = list(csv.DictReader(file))
    held = ("workers", "batch_jobs", "worker_concurrency")
    by = {(row["load"], *(row[name] for name in held)): row for row in run}
    at_once = [
        "| workers | `BATCH_JOBS` | `WORKER_CONCURRENCY` | equal jobs a minute | a mix | wait | "
        "execution |",
        "|---|---|---|---|---|---|---|",
    ]
    over_time = [
        "| arrivals | `BATCH_JOBS` | `WORKER_CONCURRENCY` | wait | execution | both |",
        "|---|---|---|---|---|---|",
    ]
    for row in run:
        settings = [row[name] for name in held]
        if row["load"] == "equal":
            both = (row, by.get(("mix", *settings)))
            told = [f"{float(one['jobs_per_minute']):.0f}" if one else "-" for one in both]
            times = [_of_typical_and_slow(row, name) for name in ("wait", "execution")]
            at_once.append(f"| {' | '.join([*settings, *told, *times])} |")
        elif row["load"].endswith("%"):
            times = [_of_typical_and_slow(row, name) for name in ("wait", "execution", "answer")]
            over_time.append(f"| {' | '.join([row['load'], *settings[1:], *times])} |")
    equal, mix, lone = (
        next(row for row in run if row["load"] == load and row["batch_jobs"] == "8")
        for load in ("equal", "mix", "lone")
    )
    return "\n".join(
        [
            *at_once,
            "",
            f"All sent at once. `BATCH_JOBS=8` did {_ratio(equal)} times the equal jobs of the "
            "worker that takes as many and\ndraws them one by one (in brackets: lowest and highest "
            f"of the rounds), {_ratio(mix)} times the mix.\nA lone job took {_ratio(lone)} of the "
            f"time: the median of {lone['jobs']} pairs, in brackets with 95% certainty.",
            "",
            *over_time,
        ]
    )


def _of_typical_and_slow(row: dict[str, str], name: str) -> str:
    typical, slow = (float(row[f"{name}{end}"]) for end in ("_s", "_p95_s"))
    return f"{typical:.1f} / {slow:.1f} s"


def _ratio(row: dict[str, str]) -> str:
    middle, low, high = (float(row[name]) for name in ("ratio", "ratio_low", "ratio_high"))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def lora_figures() -> str:
    """What `benchmarks.adapters` told when it was run last, on a CPU."""
    run = json.loads(ADAPTERS.read_text(encoding="utf-8"))
    steps = [run["step_by_one_without"][count]["median"] for count in ("1", "2", "4")]
    full = run["full_size"]

    def seconds(what: str) -> str:
        return f"{min(full[what]):.1f} to {max(full[what]):.1f} s"

    return (
        f"Measured by `python -m benchmarks.adapters` on {run['cores']} CPU cores, not on a GPU. "
        "With the miniature model, a step with one,\ntwo and four LoRAs took "
        f"{steps[0]:.3f}, {steps[1]:.3f} and {steps[2]:.3f} of the time of one without (medians, "
        "paired). At full size with random fp16 weights,\na LoRA of rank "
        f"{full['rank']} for {full['modules']} linears of the UNet ({full['file_mb']} MB): put on "
        f"in {seconds('apply_s')} (the longest the first time), changed for another\nin "
        f"{seconds('change_s')}, taken off in {seconds('restore_s')}. The originals took "
        f"{full['originals_gb']} GB; rounding lost {full['lost']:.1%} of the difference."
    )


def swap_figures() -> str:
    """What `benchmarks.swap` told of checkpoints when it was run last, on a CPU."""
    run = json.loads(SWAP.read_text(encoding="utf-8"))
    swap, start = run["swap"], run["start"]

    def seconds(state: str, layout: str) -> str:
        return _median_and_range([one["seconds"] for one in swap["from_disk"][state][layout]])

    least, most = start["file_by_folder"]["range"]
    return (
        f"Measured by `python -m benchmarks.swap` on {swap['cores']} CPU cores that others used "
        "as well, not on a GPU, at SDXL's full size\n"
        f"({swap['weights_gb']:.1f} GB of random fp16 weights, no refiner, held in "
        f"{swap['dtype']}); medians, least and most in seconds. A model took the place\nof "
        f"another, its first picture included, in {seconds('warm', 'folder')} from a folder and "
        f"{seconds('warm', 'file')} from a single file\nwhose weights are the same, with the "
        f"files in the system's page cache; in {seconds('cold', 'folder')}\nand "
        f"{seconds('cold', 'file')} without. A worker was ready in "
        f"{_median_and_range(start['ready_s']['folder'])} from the\nfolder and in "
        f"{_median_and_range(start['ready_s']['file'])} from the single file, "
        f"{start['file_by_folder']['median']:.2f} of the time ({least:.2f} to {most:.2f},"
        f" {len(start['ready_s']['file'])} pairs). How\nlong models take between card and host "
        "is not measured: without a GPU, both are one."
    )


def _median_and_range(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def few_step_figures() -> str:
    """What `benchmarks.swap` told of pictures when it was run last, on a CPU."""
    run = json.loads(SWAP.read_text(encoding="utf-8"))["pictures"]
    took, of_default = run["median_s"], run["by_default"]
    default, few = took["default"], took["few_steps"]
    lora = "and its few-step LoRA" if run["few_step_lora"] else "without a few-step LoRA"
    return (
        f"Measured by `python -m benchmarks.swap` on {run['cores']} CPU cores, not on a GPU, with "
        f"the miniature model {lora}:\nthe default picture (25 steps and the refiner's 15) took "
        f"{default:.2f} s, the base's 25 steps alone {took['base']:.2f} s, and 4 steps without "
        f"guidance\n{few:.2f} s, {of_default['few_steps']['median']:.2f} of "
        f"the default's time (medians of {run['rounds']} rounds). Of SDXL's "
        f"operations at 1024x1024,\n4 steps are {run['few_steps_of_operations']:.3f} of the "
        "default's, computed."
    )


def icon_url() -> str:
    return f"https://raw.githubusercontent.com/{publisher()}/main/docs/icon.png"


def hub_text() -> str:
    hub = json.loads(HUB.read_text(encoding="utf-8"))
    hub["iconUrl"] = icon_url()
    hub["config"]["env"] = env_inputs()
    return _document(hub)


def _document(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def derived() -> dict[Path, str]:
    """Each file with something derived in it, and what it must hold."""
    return {
        README: with_tables(
            README,
            listing=listing(),
            input=input_table(),
            **{"long-run": long_run()},
        ),
        PLATFORM: with_tables(
            PLATFORM,
            attack=attack_table(),
            formats=formats_table(),
            answers=answers_table(),
            throughput=throughput_tables(),
            uploading=uploading_table(),
        ),
        LORA: with_tables(LORA, figures=lora_figures()),
        MODELS: with_tables(MODELS, settings=settings_table(), figures=swap_figures()),
        SAMPLERS_DOCUMENT: with_tables(
            SAMPLERS_DOCUMENT,
            samplers=samplers_table(),
            nearest=nearest_table(),
            schedules=schedules_table(),
            figures=few_step_figures(),
            **{"few-step": few_step_table()},
        ),
        OPENAI: with_tables(OPENAI, parameters=openai_table(), quality=quality_table()),
        DEPLOY: with_tables(DEPLOY, gpus=gpu_table(), images=images()),
        SECURITY: with_tables(SECURITY, report=report()),
        COMPOSE: with_value(COMPOSE, "image", tagged_image()),
        ISSUE_CONFIG: with_value(ISSUE_CONFIG, "url", report_url()),
        SCHEMA: _document(Request.model_json_schema()),
        HUB: hub_text(),
    }


if __name__ == "__main__":
    for path, text in derived().items():
        path.write_text(text, encoding="utf-8")
