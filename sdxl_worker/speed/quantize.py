"""Linears in 8 bits, by torchao: lossy, and off unless `QUANTIZE` is set.

The weights are rounded once, the inputs at each pass. On a GPU that pays only in compiled code,
which rounds in the same kernel as the operation before.
"""

import logging
from collections.abc import Collection
from typing import Any

import torch

from sdxl_worker.errors import ModelError
from sdxl_worker.placement import Placement
from sdxl_worker.settings import Quantization

# The first GPUs that multiply in fp8: Ada, then Hopper and Blackwell.
FP8_CAPABILITY = (8, 9)
# cuBLAS multiplies in int8 only with more than 16 rows. A small picture has fewer at the UNet's
# lowest level.
INT8_ROWS = 17
# A tensor of zeros would be divided by its own largest number.
FP8_LEAST_RANGE = 1e-3


def check_quantization(
    quantization: Quantization, optimizations: Collection[str], placement: Placement
) -> None:
    """
    Args:
        optimizations: the others of the worker, by their names in `optimize.py`.

    Raises:
        ModelError: this machine or these settings cannot do it; the message says what to change.
    """
    gpu = placement.device.type == "cuda"
    if quantization == "fp8" and not (gpu and torch.cuda.get_device_capability() >= FP8_CAPABILITY):
        raise ModelError(
            "QUANTIZE: fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper, "
            "Blackwell); take int8, or leave it unset"
        )
    if not gpu:
        return
    if not placement.resident:
        raise ModelError(
            "QUANTIZE: needs weights that stay on the GPU, and this one has too little memory for "
            "them; leave it unset, or take a larger GPU"
        )
    # Uncompiled, rounding takes kernels of its own, and torchao's int8 reads from the GPU before
    # each product, which no CUDA graph can record.
    if not {"compile_blocks", "compile_unet"} & set(optimizations):
        raise ModelError(
            "QUANTIZE: needs compiled UNets; set COMPILE=blocks (or COMPILE=full without "
            "STEP_CACHE), or leave QUANTIZE unset"
        )


def quantize(unet: Any, quantization: Quantization) -> None:
    """Round the linears of the transformer blocks, in place and on their device.

    These are 63% of the base's operations and 49% of the refiner's at 1024x1024 (computed), and
    what `COMPILE=blocks` compiles. The keys and values of the text are not rounded: they are 0.8%
    of the operations, and would give every step the same error. Nor are the embeddings of time and
    size, which have one row, nor anything outside of the UNets.
    """
    # torchao would warn that its own kernels, which are for other formats, do not load without
    # CUDA, and torch that the way in which torchao registers itself will change.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    # Of the compiler options that torchao recommends, only the one that int8 needs is set; the
    # others would change all networks.
    config: Any
    if quantization == "int8":
        # Otherwise the products' 32-bit sums go through memory before the scales are multiplied in.
        from torch._inductor import config as compiler_config  # takes a second

        compiler_config.force_fuse_int_mm_with_mul = True
        # A scale for each row: no picture of a batch depends on the others.
        config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    else:
        # One scale for the whole tensor: torchao's scales for each row need bfloat16.
        config = Float8DynamicActivationFloat8WeightConfig(
            activation_value_lb=FP8_LEAST_RANGE, set_inductor_config=False
        )
    quantize_(unet, config, _is_quantized)
    if quantization == "int8":
        for name, module in unet.named_modules():
            if _is_quantized(module, name):
                module.__class__ = _InEnoughRows


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _InEnoughRows(torch.nn.Linear):
    """For inputs [n, tokens, features]: fills the tokens up to `INT8_ROWS`. Where there is no
    compiled code for them, a recording ends before it is broken.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and _is_recording():
            raise RuntimeError("torchao's int8 without compiled code reads from the GPU")
        tokens = states.shape[1]
        if tokens < INT8_ROWS:
            states = torch.nn.functional.pad(states, (0, 0, 0, INT8_ROWS - tokens))
        return super().forward(states)[:, :tokens]


def _is_quantized(module: torch.nn.Module, name: str) -> bool:
    return (
        isinstance(module, torch.nn.Linear)
        and ".transformer_blocks." in name
        and not name.endswith((".attn2.to_k", ".attn2.to_v"))
    )
