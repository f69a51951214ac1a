"""Optimizations: they make drawing faster and leave the picture the same, within rounding. Only
`int8`, `fp8` and `fp16_accumulation` are lossy; no mode of COMPILE has them, QUANTIZE and
FP16_ACCUMULATION add them.

`OPTIMIZATIONS` lists them in the order they are applied, `MODES` those of each mode of COMPILE.
Whatever else saves time is where it happens: resident weights in `loading/weights.py`, schedules on
the host in `no_waits.py`, rounding on the GPU and batches in `drawing/`. Attention is left to
torch: it takes cuDNN's on Hopper, the only kind of GPU where that was measured to be faster than
FlashAttention 2 (https://github.com/huggingface/transformers/pull/48163).
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from sdxl_worker.errors import ModelError
from sdxl_worker.placement import Placement
from sdxl_worker.settings import CompileMode, Settings
from sdxl_worker.speed.compiling import Compiled
from sdxl_worker.speed.cuda_graphs import GraphedForward
from sdxl_worker.speed.direct_attention import attend_directly
from sdxl_worker.speed.quantize import check_quantization, quantize
from sdxl_worker.speed.steered import CompiledForward


def optimize(optimizations: Collection[str], unet: Any, vae: Any = None) -> None:
    """Apply the named ones to a UNet and, if it is given, to the VAE: in order and in place.

    Compiling happens later, `at_the_start`, and recording at the first picture of each size.
    """
    for name, apply in OPTIMIZATIONS.items():
        if name in optimizations:
            apply(unet, vae)


def optimizations_of(settings: Settings, placement: Placement) -> Collection[str]:
    """The optimizations of a worker: on a CPU, where COMPILE and QUANTIZE ask for none, only
    `direct_attention`.

    Those of a whole UNet do not work with a step cache, for deep and shallow steps would repeat the
    same pass, nor with offloading: a CUDA graph keeps the addresses that the weights had, and a
    hook of offloading takes the place of the UNet's `forward`.

    Raises:
        ModelError: QUANTIZE or FP16_ACCUMULATION asks for what this machine or the other settings
            cannot do.
    """
    optimizations = set(MODES[settings.compile])
    if placement.device.type == "cpu":
        optimizations -= {"channels_last", "cuda_graphs"}
    if settings.step_cache is not None or not placement.resident:
        optimizations -= OF_A_WHOLE_UNET
    if settings.quantize is not None:
        check_quantization(settings.quantize, optimizations, placement)
        optimizations.add(settings.quantize)
    if settings.fp16_accumulation:
        if placement.device.type != "cuda" or placement.dtype != torch.float16:
            raise ModelError(
                "FP16_ACCUMULATION: needs a GPU, and weights in float16; leave it unset, or leave "
                "DTYPE unset on a worker with a GPU"
            )
        optimizations.add("fp16_accumulation")
    return optimizations


def _channels_last(unet: Any, vae: Any) -> None:
    unet.to(memory_format=torch.channels_last)
    if vae is not None:
        vae.to(memory_format=torch.channels_last)


def _fuse_qkv(unet: Any, vae: Any) -> None:
    unet.fuse_qkv_projections()
    if vae is not None:
        vae.fuse_qkv_projections()


def _compile_blocks(unet: Any, _: Any) -> None:
    unet.compile_repeated_blocks(fullgraph=True)


def _compile_unet(unet: Any, _: Any) -> None:
    unet.forward = CompiledForward(unet.forward)


def _compile_decoder(_: Any, vae: Any) -> None:
    if vae is not None:
        vae.decoder.forward = Compiled(vae.decoder.forward, "decoder")


def _cuda_graphs(unet: Any, _: Any) -> None:
    # What is not compiled there may be what cannot be recorded: torchao's int8.
    records = not isinstance(unet.forward, CompiledForward)
    unet.forward = GraphedForward(unet.forward, unet.device, with_residuals=records)


def _accumulate_in_fp16() -> None:
    torch.backends.cuda.matmul.allow_fp16_accumulation = True


OPTIMIZATIONS: dict[str, Callable[[Any, Any], None]] = {
    # The memory order that tensor cores take: in the other, each convolution reorders its input.
    # Not compiled, torch's group normalisation on a GPU reorders it back, up to 2.13.
    "channels_last": _channels_last,
    # Bit for bit the same, for four fifths of the host's time. Not beside what is compiled.
    "direct_attention": lambda unet, _: attend_directly(unet),
    # One product in place of three. Not with LoRA, whose weights would be left out.
    "fuse_qkv": _fuse_qkv,
    # GPUs for games sum up in 16 bits at twice the rate of 32. For the whole process, and only the
    # products of cuBLAS, which linears are.
    "fp16_accumulation": lambda *_: _accumulate_in_fp16(),
    # Tensor cores do twice as many operations in 8 bits as in 16.
    "int8": lambda unet, _: quantize(unet, "int8"),
    "fp8": lambda unet, _: quantize(unet, "fp8"),
    # The 70 and 44 transformer blocks, three quarters of the work, from a handful of compilations.
    "compile_blocks": _compile_blocks,
    # Normalisations and activations are fused with what is beside them, convolutions included.
    "compile_unet": _compile_unet,
    "compile_decoder": _compile_decoder,
    # A pass is thousands of short kernels, which the host launches slower than the GPU runs them.
    "cuda_graphs": _cuda_graphs,
}

MODES: dict[CompileMode | None, frozenset[str]] = {
    None: frozenset({"channels_last", "direct_attention"}),
    # The graphs only where `host_bound.py` finds them worth it.
    "auto": frozenset({"channels_last", "direct_attention", "cuda_graphs"}),
    "graphs": frozenset({"channels_last", "direct_attention", "cuda_graphs"}),
    "blocks": frozenset({"channels_last", "compile_blocks", "cuda_graphs"}),
    "full": frozenset({"channels_last", "compile_unet", "compile_decoder", "cuda_graphs"}),
}

OF_A_WHOLE_UNET = frozenset({"compile_unet", "cuda_graphs"})
