"""Writes the trained parts in the layout of the published SDXL: half precision, variant "fp16"."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from shapes import architecture, text_training, unet_training, vae_training
from shapes.tokenizer import write_tokenizers

VARIANT = "fp16"


def export(work: Path, out: Path, seed: int) -> None:
    """Write `out/base` and `out/refiner`; what was there before is replaced only at the end."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".new-") as folder:
        new = Path(folder)
        _write_base(work, new / "base", seed)
        _write_refiner(work, new / "refiner")
        for name in ("base", "refiner"):
            _remove_paths(new / name)
            shutil.rmtree(out / name, ignore_errors=True)
            (new / name).rename(out / name)


def _write_base(work: Path, folder: Path, seed: int) -> None:
    models = text_training.load(work)
    pipeline = StableDiffusionXLPipeline(
        vae=vae_training.load(work),
        text_encoder=models.encoder,
        text_encoder_2=models.encoder_2,
        tokenizer=models.tokenizer,
        tokenizer_2=models.tokenizer_2,
        unet=unet_training.load("base", work),
        scheduler=EulerDiscreteScheduler.from_config(architecture.SCHEDULER),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder, variant=VARIANT)
    # The library saves tokenizers in a form of its own; the published model has the classic one.
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
    write_tokenizers(folder, seed)
    _write_scheduler(folder)
    _set_index(folder, {"add_watermarker": None})


def _write_refiner(work: Path, folder: Path) -> None:
    """The refiner takes its second text encoder, tokenizer and autoencoder from the base."""
    unet = unet_training.load("refiner", work).half()
    unet.save_pretrained(folder / "unet", variant=VARIANT)
    _write_scheduler(folder)
    index = {
        "_class_name": StableDiffusionXLImg2ImgPipeline.__name__,
        "_diffusers_version": unet.config["_diffusers_version"],
        "add_watermarker": None,
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [None, None],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _set_index(folder, index)


def _write_scheduler(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(architecture.SCHEDULER, indent=2) + "\n", encoding="utf-8")


def _set_index(folder: Path, changes: dict[str, object]) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) if path.exists() else {}
    optional = {"image_encoder", "feature_extractor"}
    index = {key: value for key, value in {**index, **changes}.items() if key not in optional}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _remove_paths(folder: Path) -> None:
    """Remove from the configurations the name of the folder that a part was loaded from."""
    for path in folder.rglob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
