"""What is refused, and by which name. Each file but the first ones is a good one with one fault."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from sdxl_worker.adapters.foreign_files import of_text_width
from sdxl_worker.adapters.lora import MAX_RANK, read_lora
from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.errors import RequestError
from sdxl_worker.loading.models import Models
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from tests.adapters.lora_files import FIELD, lora_of, saved, weights
from tools.original_format import base_checkpoint, save

TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "unet.mid_block.resnets.0.conv1"
NORM = "unet.mid_block.resnets.0.norm1"

Shapes = dict[str, tuple[int, ...]]


def lora(name: str, rows: int = 80, columns: int = 80, rank: int = 2) -> Shapes:
    return {f"{name}.lora_down.weight": (rank, columns), f"{name}.lora_up.weight": (rows, rank)}


GOOD = lora(TO_Q)
KOHYA_1 = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
KOHYA_2 = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"

FOREIGN: dict[str, tuple[Shapes, str]] = {
    "by width, SD 1.5": (lora(KOHYA_1, 640, 768), r"Stable Diffusion 1\.x\): its text is 768 num"),
    "by width, SD 2": (lora(KOHYA_1, 640, 1024), r"Stable Diffusion 2\.x\): its text is 1024"),
    "by width, the refiner": (lora(KOHYA_2, 640, 1280), r"the refiner of SDXL\): its text is 1280"),
    "full size": (
        lora(KOHYA_2, 640, 2048),
        r"is for a model of other sizes \(SDXL in its full size\): its text is 2048 numbers wide, "
        r"that of this worker's model 112; use a LoRA that was made for this model$",
    ),
    "full size, LoHa": (
        {
            f"{KOHYA_2}.hada_w{i}_{side}": size
            for i in (1, 2)
            for side, size in (("a", (640, 2)), ("b", (2, 2048)))
        },
        "SDXL in its full size",
    ),
    "no known size": (
        lora(KOHYA_2, 640, 99),
        r"for a model of other sizes: its text is 99 numbers",
    ),
    "Flux, kohya": (
        lora("lora_unet_double_blocks_0_img_attn_proj"),
        "is for Flux, or a model like",
    ),
    "Flux, diffusers": (lora("transformer.single_transformer_blocks.0.attn.to_q"), "is for Flux"),
    "SD 3, kohya": (
        lora("lora_unet_joint_blocks_0_x_block_attn_proj"),
        "is for Stable Diffusion 3",
    ),
    "SD 3, diffusers": (
        lora("transformer.transformer_blocks.0.attn.add_k_proj"),
        "Diffusion 3, not",
    ),
    "Cascade": (lora("lora_prior_unet_down_blocks_0_1"), "for Stable Cascade, not for SDXL; use"),
    "Wan": (lora("diffusion_model.blocks.0.self_attn.q"), "is for Wan"),
    "Qwen": (lora("transformer.transformer_blocks.0.img_mlp.net.2"), "is for Qwen-Image"),
    "IP-Adapter": ({"ip_adapter.1.to_k_ip.weight": (4, 4)}, "is an IP-Adapter, not a LoRA"),
    "ControlNet": (
        {"controlnet_cond_embedding.conv_in.weight": (4, 3, 3, 3)},
        "is a ControlNet, not a LoRA",
    ),
    "control LoRA": ({"lora_controlnet": (1,)}, "is a ControlNet"),
    "textual inversion": (
        {"clip_l": (2, 48), "clip_g": (2, 64)},
        "is a textual inversion, not a LoRA; give it as one of `embeddings`",
    ),
    "bundled embedding": (
        GOOD | {"bundle_emb.cat.clip_l": (2, 48)},
        r"with a textual inversion in it \(keys `bundle_emb\.\.\.`\)",
    ),
    "OFT": ({f"{TO_Q}.oft_blocks": (4, 20, 20)}, "is of the format OFT, which is not served"),
    "GLoRA": ({f"{TO_Q}.a1.weight": (4, 20)}, "is of the format GLoRA, which is not served"),
    "empty": ({}, "is a file without tensors, not a LoRA"),
}

WRONG: dict[str, tuple[Shapes, str]] = {
    "unknown module": (
        GOOD | lora("unet.mid_block.attentions.7.proj_in"),
        r"has keys that fit no part of SDXL: unet\.mid_block\.attentions\.7\.proj_in\.lora_down"
        r"\.weight, unet\S+; use a LoRA",
    ),
    "unknown part": (GOOD | {f"{TO_Q}.lora_left.bias": (1,)}, r"fit no part.*: \S+lora_left\.bias"),
    "many unknown": (
        GOOD | {f"{i}.lora_up.weight": (1, 1) for i in range(9)},
        r"\d\.lora_up\.weight, \d\.lora_up\.weight, \d\.lora_up\.weight and 6 more;",
    ),
    "an embedding": (lora("lora_te1_text_model_embeddings_token_embedding"), "fit no part of SDXL"),
    "two for a part": (
        GOOD | lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"),
        r"has two keys for the same part of a module: ",
    ),
    "two spellings of a part": (
        GOOD | {f"{TO_Q}.lora_A.weight": (2, 80)},
        r"has two keys for the same part of a module: \S+lora_\S+, \S+lora_",
    ),
    "down without up": (
        GOOD | {f"{TO_K}.lora_down.weight": (2, 112)},
        rf"has keys without those that belong to them: {TO_K}\.lora_down\.weight; use a file that",
    ),
    "alpha alone": (GOOD | {f"{TO_K}.alpha": ()}, rf"without those.*: {TO_K}\.alpha;"),
    "DoRA alone": (GOOD | {f"{TO_K}.dora_scale": (80, 1)}, rf"without.*{TO_K}\.dora_scale"),
    "DoRA of a bias": (
        GOOD | {f"{CONVOLUTION}.dora_scale": (80, 1), f"{CONVOLUTION}.diff_b": (80,)},
        "without those that belong to them",
    ),
    "DoRA twice": (
        GOOD | {f"{TO_Q}.dora_scale": (80, 1), f"{TO_Q}.lora_magnitude_vector": (80,)},
        "without those",
    ),
    "DoRA of a difference": (
        {f"{TO_Q}.dora_scale": (80, 1), f"{TO_Q}.diff": (80, 80)},
        "without those that belong",
    ),
    "LoHa with half a core": (
        {f"{CONVOLUTION}.hada_{part}": (2, 80) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
        | {f"{CONVOLUTION}.hada_t1": (2, 2, 3, 3)},
        "without those",
    ),
    "LoKr without its second": ({f"{TO_Q}.lokr_w1": (8, 8)}, "without those"),
    "two formats in a module": (GOOD | {f"{TO_Q}.diff": (80, 80)}, "without those"),
    "IA3 without its side": (GOOD | {f"{TO_K}.weight": (80,)}, rf"without.*: {TO_K}\.weight"),
    "a side without IA3": (GOOD | {f"{TO_K}.on_input": ()}, rf"without.*: {TO_K}\.on_input"),
    "a bias without its LoRA": (GOOD | {f"{CONVOLUTION}.lora_up.bias": (80,)}, "without those"),
    "two biases": (
        lora(CONVOLUTION) | {f"{CONVOLUTION}.diff_b": (80,), f"{CONVOLUTION}.lora_up.bias": (80,)},
        "without those",
    ),
    "wrong rows": (
        GOOD | lora(TO_K, 64, 112),
        rf"is for a model of other sizes, in 1 modules: {TO_K}\.lora_\S+ gives \[64, 112\], here "
        r"\[80, 112\]; use a LoRA that was made for this model",
    ),
    "all wrong": (lora(TO_Q, 64, 80), "of other sizes, in all 1 modules"),
    "ranks that differ": (
        {f"{TO_Q}.lora_down.weight": (2, 80), f"{TO_Q}.lora_up.weight": (80, 3)},
        "gives no shape, here",
    ),
    "no rank": (lora(TO_Q, rank=0), "gives no shape, here"),
    "a rank that takes much memory": (
        lora(TO_Q, rank=MAX_RANK + 1),
        rf"has a rank of more than 4096, in {TO_Q}\.lora_down\.weight; use one of a smaller rank",
    ),
    "a Tucker core that does": (
        {
            f"{CONVOLUTION}.lora_up.weight": (80, 1, 1, 1),
            f"{CONVOLUTION}.lora_mid.weight": (1, MAX_RANK + 1, 3, 3),
            f"{CONVOLUTION}.lora_down.weight": (MAX_RANK + 1, 80, 1, 1),
        },
        r"rank of more than 4096, in \S+lora_(mid|down)\.weight",
    ),
    "a factor of LoKr that does": (
        {
            f"{TO_Q}.lokr_w1_a": (8, MAX_RANK + 1),
            f"{TO_Q}.lokr_w1_b": (MAX_RANK + 1, 8),
            f"{TO_Q}.lokr_w2": (10, 10),
        },
        r"rank of more than 4096, in \S+lokr_w1_a",
    ),
    "too few dimensions": (
        {f"{TO_Q}.lora_down.weight": (80,), f"{TO_Q}.lora_up.weight": (80,)},
        "gives no shape",
    ),
    "a number for a matrix": (
        {f"{TO_Q}.lora_down.weight": (), f"{TO_Q}.lora_up.weight": ()},
        "gives no shape",
    ),
    "Tucker of other ranks": (
        {
            f"{CONVOLUTION}.lora_up.weight": (80, 2, 1, 1),
            f"{CONVOLUTION}.lora_mid.weight": (3, 2, 3, 3),
            f"{CONVOLUTION}.lora_down.weight": (2, 80, 1, 1),
        },
        "gives no shape",
    ),
    "LoHa halves that differ": (
        {
            f"{TO_Q}.hada_w1_a": (80, 2),
            f"{TO_Q}.hada_w1_b": (2, 80),
            f"{TO_Q}.hada_w2_a": (40, 2),
            f"{TO_Q}.hada_w2_b": (2, 80),
        },
        "gives no shape",
    ),
    "LoHa core of other ranks": (
        {f"{CONVOLUTION}.hada_{part}": (2, 80) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
        | {f"{CONVOLUTION}.hada_t{i}": (3, 2, 3, 3) for i in (1, 2)},
        "gives no shape",
    ),
    "LoKr of another product": (
        {f"{TO_Q}.lokr_w1": (8, 8), f"{TO_Q}.lokr_w2": (10, 11)},
        r"gives \[80, 88\], here \[80, 80\]",
    ),
    "LoKr with a first of three": (
        {f"{TO_Q}.lokr_w1": (8, 8, 1), f"{TO_Q}.lokr_w2": (10, 10)},
        "gives no shape",
    ),
    "a kernel of another size": (
        {
            f"{CONVOLUTION}.lora_down.weight": (2, 80, 1, 1),
            f"{CONVOLUTION}.lora_up.weight": (80, 2, 1, 1),
        },
        r"gives \[80, 80, 1, 1\], here \[80, 80, 3, 3\]",
    ),
    "lengths of DoRA": (
        GOOD | {f"{TO_Q}.dora_scale": (79, 1)},
        r"dora_scale gives \[79, 1\], here \[80, 80\]",
    ),
    "IA3 of another size": (
        {f"{TO_Q}.weight": (79,), f"{TO_Q}.on_input": ()},
        r"gives \[79, -1\], here",
    ),
    "IA3 of a norm": ({f"{NORM}.weight": (80,), f"{NORM}.on_input": ()}, "of other sizes"),
    "a norm of another size": ({f"{NORM}.w_norm": (79,)}, r"gives \[79\], here \[80\]"),
    "a LoRA of a norm": (lora(NORM), r"here \[80\]"),
    "a bias that is not there": (
        {f"{TO_Q}.diff_b": (80,)},
        r"diff_b gives \[80\], here none",
    ),
    "a bias of another size": (
        {f"{CONVOLUTION}.diff_b": (79,)},
        r"diff_b gives \[79\], here \[80\]",
    ),
    "several alphas": (GOOD | {f"{TO_Q}.alpha": (2,)}, rf"more than one number in {TO_Q}\.alpha"),
}


def zeros(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("case", [*FOREIGN, *WRONG])
def test_a_file_is_refused_by_what_it_is_or_by_the_keys_that_are_wrong(
    case: str, models: Models, tmp_path: Path
) -> None:
    shapes, message = (FOREIGN | WRONG)[case]
    with pytest.raises(
        RequestError, match=rf"(?s)^loras\[0\]\.path: style\.safetensors .*{message}"
    ):
        lora_of(tmp_path, models, zeros(shapes))


def test_a_rank_that_is_large_is_taken(models: Models, tmp_path: Path) -> None:
    assert lora_of(tmp_path, models, zeros(lora(TO_Q, rank=MAX_RANK))).changes


def test_keys_are_told_in_characters_that_can_be_told(models: Models, tmp_path: Path) -> None:
    header = {"\ud800\n\x1b[2J.alpha": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    path = tmp_path / "style.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"12")
    with pytest.raises(RequestError, match=r"no part of SDXL: \\ud800\\n\\u001b\[2J\.alpha;"):
        read_lora(saved(path), 1.0, FIELD, models)


def test_full_size_models_are_told_apart_by_the_width_of_their_text() -> None:
    assert of_text_width(768, 2048) == (
        "for Stable Diffusion 1.x, not for SDXL; use a LoRA that was made for SDXL"
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, r"for Stable Diffusion 1\.x, not"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, r"Diffusion 2\.x, not for"),
        ({"modelspec.architecture": "stable-diffusion-3-medium/lora"}, "Stable Diffusion 3, not"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "for Flux, not for SDXL"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"}, "the refiner of SDXL"),
        (
            {"ss_base_model_version": "sd_v1"},
            r"for Stable Diffusion 1\.x, not for SDXL; use a LoRA",
        ),
        ({"ss_base_model_version": "sd3"}, "for Stable Diffusion 3"),
        ({"lora_adapter_metadata": "{"}, "metadata of which lora_adapter_metadata is not underst"),
        (
            {"lora_adapter_metadata": '{"unet.use_dora": true}'},
            "has keys without those that belong",
        ),
    ],
)
def test_a_file_is_refused_by_what_its_metadata_say(
    metadata: dict[str, str], message: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        lora_of(tmp_path, models, zeros(GOOD), metadata=metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
        {"ss_base_model_version": "sdxl_base_v1-0"},
        {"ss_base_model_version": "my own"},
    ],
)
def test_other_metadata_are_no_reason_to_refuse(
    metadata: dict[str, str], models: Models, tmp_path: Path
) -> None:
    assert len(lora_of(tmp_path, models, zeros(GOOD), metadata=metadata).changes) == 1


def test_a_long_note_takes_no_time(models: Models, tmp_path: Path) -> None:
    metadata = {"ss_base_model_version": "xl" * 50_000}
    began = time.perf_counter()
    lora_of(tmp_path, models, zeros(GOOD), metadata=metadata)
    assert time.perf_counter() - began < 1, "it took the square of the note's length"


def whole_checkpoint(path: Path) -> Path:
    return save(base_checkpoint(EMBEDDED_MODEL_DIR / "base"), path)


def own_file(folder: str) -> Callable[[Path], Path]:
    def find(_: Path) -> Path:
        [path] = (EMBEDDED_MODEL_DIR / "base" / folder).glob("*.safetensors")
        return path

    return find


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (whole_checkpoint, "is a whole checkpoint, not a LoRA; it can be served as a model"),
        (own_file("unet"), "is the weights of a UNet, not a LoRA"),
        (own_file("vae"), "is a VAE, not a LoRA"),
        (own_file("text_encoder_2"), "is the weights of a text encoder, not a LoRA"),
    ],
)
def test_files_of_models_are_named(
    make: Callable[[Path], Path], message: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        read_lora(saved(make(tmp_path / "x.safetensors")), 1, FIELD, models)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(
    number: float, models: Models, tmp_path: Path
) -> None:
    tensors = zeros(GOOD) | {f"{TO_Q}.alpha": torch.tensor(number)}
    with pytest.raises(RequestError, match=rf"no finite number in {TO_Q}\.alpha"):
        lora_of(tmp_path, models, tensors)


def test_numbers_of_a_format_that_no_tensor_here_has_are_refused(
    models: Models, tmp_path: Path
) -> None:
    tensors = zeros(GOOD) | {f"{TO_Q}.alpha": torch.tensor(1 + 1j)}
    with pytest.raises(RequestError, match=rf"fit no part of SDXL: {TO_Q}\.alpha"):
        lora_of(tmp_path, models, tensors)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8]
)
def test_numbers_of_many_formats_are_read(
    dtype: torch.dtype, models: Models, tmp_path: Path
) -> None:
    before = weights(models)
    difference = torch.randint(-3, 4, (80, 80)).to(dtype)
    name = TO_Q.removeprefix("unet.")
    patches_of(models).apply([lora_of(tmp_path, models, {f"{TO_Q}.diff": difference})])
    weight = models.unet.get_submodule(name).weight
    assert torch.equal(weight, before[f"{TO_Q}.weight"] + difference.float())


def test_a_file_that_is_gone_is_refused(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    save_file(zeros(GOOD), path)
    file = saved(path)
    path.unlink()
    with pytest.raises(RequestError, match=r"gone\.safetensors could not be read \(No such file"):
        read_lora(file, 1, FIELD, models)


def test_a_file_that_is_refused_is_closed(models: Models, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        lora_of(tmp_path, models, zeros(lora(TO_Q, 64, 80)))
    # Its traceback holds what was made.
    assert refused.tb is not None
    path = str(tmp_path / "style.safetensors")
    assert path not in [file.path for file in psutil.Process().open_files()]


def test_a_linear_may_be_written_as_a_convolution_of_one_pixel(
    models: Models, tmp_path: Path
) -> None:
    shapes: Shapes = {
        f"{TO_Q}.lora_down.weight": (2, 80, 1, 1),
        f"{TO_Q}.lora_up.weight": (80, 2, 1, 1),
    }
    assert len(lora_of(tmp_path, models, zeros(shapes)).changes) == 1


def test_a_few_step_lora_of_the_whole_unet_is_read(models: Models, tmp_path: Path) -> None:
    """LCM-LoRA reaches all linears and convolutions within the blocks, by kohya's prefix and
    diffusers' names; SDXL-Lightning and Hyper-SD reach part of them."""
    tensors = {}
    for name, module in models.unet.named_modules():
        if "." in name and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            prefix = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{prefix}.lora_down.weight"] = torch.zeros(2, *module.weight.shape[1:])
            tensors[f"{prefix}.lora_up.weight"] = torch.zeros(
                module.weight.shape[0], 2, *[1] * (module.weight.ndim - 2)
            )
            tensors[f"{prefix}.alpha"] = torch.tensor(2.0)
    assert len(lora_of(tmp_path, models, tensors).changes) == len(tensors) // 3
