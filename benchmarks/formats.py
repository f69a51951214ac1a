"""Bytes and time of each format at 1024 x 1024, and how many pictures an answer has room for.

There is no photograph in this repository. The pictures are made to be as hard to compress as
SDXL's: colours of 1/f noise, as natural pictures have them, edges, and grain, and take 1.7 bytes a
pixel as PNG, where SDXL's take 1.5 to 2.8. On its pictures, the sizes may differ by some percent.

    python -m benchmarks.formats
"""

import argparse
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import common
from benchmarks.ways import psnr_db
from sdxl_worker.outputs.answer import encode_pictures
from sdxl_worker.outputs.metadata import About
from sdxl_worker.outputs.size_guard import result_bytes
from sdxl_worker.request import parse_request

SIDE_PX = 1024
MAX_IMAGES = 8
WAYS: dict[str, dict[str, Any]] = {
    "PNG": {"output_format": "png"},
    "PNG, encoded once more": {"output_format": "png", "smallest": True},
    "WebP 100, lossless": {"output_format": "webp", "quality": 100},
    "JPEG 100": {"output_format": "jpeg", "quality": 100},
    "JPEG 95": {"output_format": "jpeg", "quality": 95},
    "JPEG 90": {"output_format": "jpeg", "quality": 90},
    "JPEG 80": {"output_format": "jpeg", "quality": 80},
    "WebP 95": {"output_format": "webp", "quality": 95},
    "WebP 90": {"output_format": "webp", "quality": 90},
    "WebP 80": {"output_format": "webp", "quality": 80},
}


def photograph(seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(SIDE_PX)]))
    frequency[0, 0] = 1

    def noise(power: float) -> np.ndarray:
        spectrum = np.fft.fft2(random.normal(size=(SIDE_PX, SIDE_PX))) / frequency**power
        values = np.fft.ifft2(spectrum).real
        return (values - values.mean()) / values.std()

    light = 35 * noise(1.5) + random.normal(0, 2.2, (SIDE_PX, SIDE_PX))
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX] / SIDE_PX
    for _ in range(60):
        centre_x, centre_y, radius = random.random(), random.random(), random.random() ** 2 / 4
        light[(x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2] += 22 * random.normal()
    colours = [128 + light + 12 * noise(1.7) + random.normal(0, 0.7, light.shape) for _ in "RGB"]
    return Image.fromarray(np.stack(colours, -1).clip(0, 255).round().astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="of each format (default: 9)")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    about = About("stabilityai/stable-diffusion-xl-base-1.0", "no_prompts", "31e35c80fc")
    pictures = [photograph(seed) for seed in range(MAX_IMAGES)]
    requests = [
        parse_request({"prompt": "a photograph", "num_images": count, "duplicate_first": twice})
        for count in range(1, MAX_IMAGES + 1)
        for twice in (True, False)
    ]
    milliseconds: dict[str, list[float]] = {name: [] for name in WAYS}
    # In turns, so that whatever else the machine does meets all of them.
    for i in tqdm(range(arguments.repeats), unit="round"):
        picture = [pictures[i % MAX_IMAGES]]
        for name, way in WAYS.items():
            started = time.thread_time()
            encode_pictures(picture, requests[0], about=about, **way)
            milliseconds[name].append(1000 * (time.thread_time() - started))

    formats, answers = [], []
    for name, way in WAYS.items():
        files = encode_pictures(pictures, requests[0], about=about, **way)
        decoded = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
        ms = statistics.median(milliseconds[name])
        formats.append(
            {
                "format": name,
                "bytes": round(statistics.mean(map(len, files))),
                "psnr_db": round(psnr_db(decoded, pictures), 1),
                "ms": round(ms, 1),
                "times_png": round(ms / statistics.median(milliseconds["PNG"]), 1),
            }
        )
        answers += [
            {
                "format": name,
                "num_images": request.num_images,
                "duplicate_first": request.duplicate_first,
                "bytes": result_bytes(files[: request.num_images], request, way["output_format"]),
            }
            for request in requests
        ]
    results = {**common.machine(), "formats": formats, "answers": answers}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "formats.json").write_text(json.dumps(results, indent=1) + "\n")
    print(common.markdown_table([list(formats[0]), *(list(one.values()) for one in formats)]))


if __name__ == "__main__":
    main()
