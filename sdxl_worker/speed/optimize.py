"""What makes drawing faster and leaves the picture the same, within rounding; but for `int8` and
`fp8`, which are lossy: no mode of COMPILE has them, QUANTIZE adds one.

`OPTIMIZATIONS` is the list, in the order it is applied; `MODES` says which of them a worker takes.
What is not a matter of the networks is where it happens: resident weights in `loading/weights.py`,
schedules on the host in `no_waits.py`, rounding on the GPU and batches in `drawing/`. Attention is
left to torch: it takes cuDNN's on Hopper, which is the only kind of GPU where that was measured to
be faster than FlashAttention 2 (https://github.com/huggingface/transformers/pull/48163).
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from sdxl_worker.placement import Placement
from sdxl_worker.settings import CompileMode, Settings
from sdxl_worker.speed.cuda_graphs import GraphedForward
from sdxl_worker.speed.quantize import check_quantization, quantize


def optimize(optimizations: Collection[str], unet: Any, vae: Any = None) -> None:
    """Apply the named ones to a UNet, and to the decoder if it is given, in order.

    In place. Nothing that is compiled or recorded is so before the first picture of its size.
    """
    for name, apply in OPTIMIZATIONS.items():
        if name in optimizations:
            apply(unet, vae)


def optimizations_of(settings: Settings, placement: Placement) -> Collection[str]:
    """What a worker takes: nothing on a CPU, unless COMPILE asks for it.

    What is done to a whole UNet goes neither with a step cache, for it would repeat one way for
    both kinds of steps, nor with offloading: a CUDA graph holds on to where the weights were, and
    a hook of offloading is put in the place of the UNet's `forward`.

    Raises:
        ModelError: QUANTIZE asks for what this machine or the other settings cannot do.
    """
    optimizations = set(MODES[settings.compile])
    if placement.device.type == "cpu":
        optimizations -= {"channels_last", "cuda_graphs"}
    if settings.step_cache is not None or not placement.resident:
        optimizations -= OF_A_WHOLE_UNET
    if settings.quantize is not None:
        check_quantization(settings.quantize, optimizations, placement)
        optimizations.add(settings.quantize)
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
    _allow_many_shapes()
    unet.compile_repeated_blocks(fullgraph=True)


def _compile_unet(unet: Any, _: Any) -> None:
    _allow_many_shapes()
    unet.forward = torch.compile(unet.forward, fullgraph=True)


def _compile_decoder(_: Any, vae: Any) -> None:
    if vae is not None:
        vae.decoder.compile(fullgraph=True)


def _cuda_graphs(unet: Any, _: Any) -> None:
    unet.forward = GraphedForward(unet.forward, unet.device)


OPTIMIZATIONS: dict[str, Callable[[Any, Any], None]] = {
    # The order that tensor cores take: in the other one, each convolution turns its input round.
    # Where it is not compiled, torch's group normalisation on a GPU turns it back, up to 2.13.
    "channels_last": _channels_last,
    # One product in place of three. Not with LoRA, whose weights would be left out.
    "fuse_qkv": _fuse_qkv,
    # Tensor cores do twice as many operations in 8 bits as in 16.
    "int8": lambda unet, _: quantize(unet, "int8"),
    "fp8": lambda unet, _: quantize(unet, "fp8"),
    # The 70 and 44 transformer blocks, three quarters of the work, from a handful of compilations.
    "compile_blocks": _compile_blocks,
    # Normalisations and activations melt into what stands beside them, convolutions included.
    "compile_unet": _compile_unet,
    "compile_decoder": _compile_decoder,
    # A pass is thousands of short kernels, which the host launches slower than the GPU runs them.
    "cuda_graphs": _cuda_graphs,
}

MODES: dict[CompileMode | None, frozenset[str]] = {
    None: frozenset({"channels_last"}),
    "graphs": frozenset({"channels_last", "cuda_graphs"}),
    "blocks": frozenset({"channels_last", "compile_blocks", "cuda_graphs"}),
    "full": frozenset({"channels_last", "compile_unet", "compile_decoder", "cuda_graphs"}),
}

OF_A_WHOLE_UNET = frozenset({"compile_unet", "cuda_graphs"})


def _allow_many_shapes() -> None:
    """On this thread. Of a block, code is made for each width, for one size and for all, with and
    without guidance, for prompts of one part and of more. Beyond the limit a job would fail."""
    torch._dynamo.config.recompile_limit = 64
