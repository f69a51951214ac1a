"""Whether the host is what a UNet's passes wait for.

A pass is about two thousand launches. Where the host takes longer for them than the GPU for their
work, the GPU idles in between, and a CUDA graph, which is launched as a whole, saves that time.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)

# Of a pass. Its end, where the host has launched all and the GPU works on, is short then. A host
# that is ahead may have to wait, too, where CUDA's queue is full, but is done well before the GPU.
HOST_SHARE = 0.9
PASSES = 2

TOKENS = 77
TIME_IDS = 6


@torch.no_grad()
def is_host_bound(run: Callable[[], object], wait: Callable[[], object]) -> bool:
    """
    Args:
        run: queues a pass on the device. It has run before, so that nothing in it is a first use.
        wait: returns once the device has done all that is queued.
    """
    hosts, passes = [], []
    wait()
    for _ in range(PASSES):
        started = time.perf_counter()
        run()
        hosts.append(time.perf_counter() - started)
        wait()
        passes.append(time.perf_counter() - started)
    # What disturbs a pass makes it longer.
    host, whole = min(hosts), min(passes)
    is_bound = host >= HOST_SHARE * whole
    log.info(
        "COMPILE=auto: a pass takes %.1f ms, of which the host needs %.1f: CUDA graphs are %s",
        1000 * whole,
        1000 * host,
        "used" if is_bound else "not used",
    )
    return is_bound


def unet_pass(unet: Any) -> Callable[[], object]:
    """A pass of the base as a step with guidance calls it, for one picture of its native size, with
    random numbers: zeros would take less power, and so less time."""
    config = unet.config
    options: dict[str, Any] = {"device": unet.device, "dtype": unet.dtype}
    pooled = config.projection_class_embeddings_input_dim
    pooled -= TIME_IDS * config.addition_time_embed_dim
    side = config.sample_size
    sample = torch.randn(2, config.in_channels, side, side, **options)
    timestep = torch.full((), 500.0, device=unet.device)
    states = torch.randn(2, TOKENS, config.cross_attention_dim, **options)
    added = {
        "text_embeds": torch.randn(2, pooled, **options),
        "time_ids": torch.full((2, TIME_IDS), 1024.0, **options),
    }
    return lambda: unet(
        sample,
        timestep,
        encoder_hidden_states=states,
        added_cond_kwargs=added,
        return_dict=False,
    )
