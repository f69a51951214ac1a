"""What a job costs on the host: everything but the networks, for one picture, on one core.

The picture is smooth with grain, like a photograph: its PNG takes about as many bytes as SDXL's do.
With a GPU, its 3 MB copy to the host comes in addition, which is not measured here.

    python -m benchmarks.overhead
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import common

JOB_INPUT = {
    "prompt": "A cute fluffy white dog in the style of a Pixar animation 3D drawing.",
    "negative_prompt": "blurry, low quality",
    "seed": 3,
    "height": 1024,
    "width": 1024,
}
TARGET_MS = 40
TARGET_PNG_MS = 20
COMPARED = ("Pillow PNG, level 1", "Pillow PNG, level 6")


def sample_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture to encode: colours that change slowly, edges, and grain."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 64, width // 64, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    edges = np.asarray(Image.fromarray(coarse[::2, ::2]).resize((width, height), 0), np.float32)
    grain = random.normal(0, 3, (height, width, 1)) + random.normal(0, 1.5, (height, width, 3))
    return Image.fromarray((0.8 * smooth + 0.2 * edges + grain).clip(0, 255).astype(np.uint8))


def host_phases() -> dict[str, Callable[[], Any]]:
    """The phases of a job on the host in their order, each ready to be called again and again."""
    import torch

    from sdxl_worker.drawing.schedulers import build_scheduler
    from sdxl_worker.loading.model_dir import find_model_dir
    from sdxl_worker.loading.models import load_models
    from sdxl_worker.outputs.answer import build_output, data_uri
    from sdxl_worker.outputs.metadata import About, describe
    from sdxl_worker.outputs.png import encode_png
    from sdxl_worker.outputs.size_guard import result_bytes
    from sdxl_worker.request import parse_request
    from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings

    torch.set_num_threads(1)
    models = load_models(find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR)))
    request = parse_request(JOB_INPUT)
    picture = sample_picture(1024, 1024)
    pixels = torch.from_numpy(np.array(picture))[None]
    about = About(models.name, "all")
    text = describe(request, 0, picture.size, about)
    png = encode_png(np.asarray(picture), text)
    output = build_output([data_uri(png, "png")], request)
    result = json.dumps({"output": output}, ensure_ascii=False)

    def tokenise() -> None:
        for words in (request.prompt, request.negative_prompt):
            for tokenizer in (models.tokenizer, models.tokenizer_2):
                tokenizer(words, add_special_tokens=False, verbose=False)

    def schedules() -> None:
        for steps in (request.num_inference_steps, request.refiner_inference_steps):
            build_scheduler(
                request.scheduler, models.scheduler_config, begins_in_mid_schedule=False
            ).set_timesteps(steps, device="cpu")

    def latents() -> None:
        generator = torch.Generator("cpu").manual_seed(request.seed)
        for _ in ("base", "refiner"):
            torch.randn(1, 4, 128, 128, generator=generator, dtype=torch.float16)

    return {
        "validation": lambda: parse_request(JOB_INPUT),
        "tokenising": tokenise,
        "schedules": schedules,
        "latents": latents,
        "to pictures": lambda: [Image.fromarray(array) for array in pixels.numpy()],
        "text chunks": lambda: describe(request, 0, picture.size, about),
        "PNG": lambda: encode_png(np.asarray(picture), text),
        "base64": lambda: data_uri(png, "png"),
        "size check": lambda: result_bytes([png], request, "png"),
        "JSON of the SDK": lambda: json.dumps({"output": output}, ensure_ascii=False),
        "UTF-8 of the SDK": lambda: result.encode(),
    }


def compared_phases() -> dict[str, Callable[[], Any]]:
    """The PNG as Pillow makes it."""
    picture = sample_picture(1024, 1024)
    return {
        name: lambda level=level: picture.save(io.BytesIO(), "png", compress_level=level)  # type: ignore[misc]
        for name, level in zip(COMPARED, (1, 6), strict=True)
    }


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """CPU time of this thread, which other processes do not add to; after one call not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.thread_time()
        call()
        seconds.append(time.thread_time() - started)
    return 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20, help="of each phase (default: 20)")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    machine = common.machine()
    phases = host_phases()
    figures = {
        name: median_ms(call, arguments.repeats)
        for name, call in tqdm((phases | compared_phases()).items(), unit="phase")
    }
    total = sum(figures[name] for name in phases)

    results = common.CsvFile(arguments.out / "overhead.csv", [*machine, "phase", "ms"])
    lines: list[tuple[str, str]] = [("phase", "ms")]
    for name, ms in [*figures.items(), ("total", total)]:
        results.add({**machine, "phase": name, "ms": round(ms, 3)})
        lines.append((name, f"{ms:.2f}"))
    print(common.markdown_table(lines))
    print(f"targets: total at most {TARGET_MS} ms, PNG at most {TARGET_PNG_MS} ms")
    common.bar_chart(
        results.path.with_suffix(".png"),
        "One 1024 x 1024 picture on the host, one core",
        "ms",
        [*phases, "total", COMPARED[0]],
        {"ms": [figures[name] for name in phases] + [total, figures[COMPARED[0]]]},
    )


if __name__ == "__main__":
    main()
