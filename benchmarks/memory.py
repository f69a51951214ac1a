"""The peak of live tensors in one pass of each network of SDXL, counted on the meta device.

The figures behind `sdxl_worker/drawing/batches.py`: bytes a pixel, with guidance and in 16-bit
numbers. The weights are not in them; attention counts as its output alone, as FlashAttention
computes it.

    python -m benchmarks.memory
"""

import argparse
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetUnionModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks import common
from benchmarks.flops import decoder_inputs, encoder_inputs, meta_networks, unet_inputs
from benchmarks.sdxl_architecture import write_configs

SIZE_PX = 1024
BATCHES = (1, 8)
NETWORKS = {
    "base UNet": "unet",
    # A ControlNet's pass, and then the base's with what it adds.
    "base UNet, controlled": "unet",
    "refiner UNet": "refiner_unet",
    "decoder": "vae",
    "encoder": "vae",
}


class PeakBytes(TorchDispatchMode):
    """Counts the memory of all tensors made inside it, as long as each lives."""

    def __init__(self, network: torch.nn.Module) -> None:
        """
        Args:
            network: whose weights are not counted.
        """
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class FlashAttention(TorchFunctionMode):
    """Attention that makes its output and nothing beside it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counted:
    network: str
    pictures: int
    bytes_per_pixel: float
    """Of one picture."""
    peak_gb: float


@torch.no_grad()
def peak_bytes(network: torch.nn.Module, run: Callable[[], object]) -> int:
    """The peak of `run`, which passes tensors on the meta device through the network."""
    with PeakBytes(network) as bytes_, FlashAttention():
        run()
    return bytes_.peak


def count(networks: dict[str, Any], name: str, pictures: int, size_px: int = SIZE_PX) -> Counted:
    """Count one pass of a network in 16-bit numbers, with guidance where it is a UNet.

    Args:
        networks: on the meta device.
        name: of `NETWORKS`.
    """
    network = networks[NETWORKS[name]].half()
    if name == "decoder":
        latents = decoder_inputs(network, pictures, size_px, size_px)
        peak = peak_bytes(network, lambda: network.decode(*latents))
    elif name == "encoder":
        picture = encoder_inputs(network, pictures, size_px, size_px)
        peak = peak_bytes(network, lambda: network.encode(*picture))
    elif name == "base UNet, controlled":
        inputs = unet_inputs(network, 2 * pictures, size_px, size_px)
        controlnet = union_controlnet(network)
        both = torch.nn.ModuleList([network, controlnet])
        peak = peak_bytes(both, lambda: network(**inputs, **residuals(controlnet, inputs)))
    else:
        inputs = unet_inputs(network, 2 * pictures, size_px, size_px)
        peak = peak_bytes(network, lambda: network(**inputs))
    return Counted(name, pictures, peak / pictures / size_px**2, peak / 1e9)


def union_controlnet(unet: Any) -> Any:
    """As large as xinsir's, on the meta device and in 16-bit numbers."""
    with torch.device("meta"):
        return ControlNetUnionModel.from_unet(unet, load_weights_from_unet=False).half().eval()


def residuals(controlnet: Any, inputs: dict[str, Any], types: int = 1) -> dict[str, Any]:
    """What the UNet is given beside its own inputs.

    Args:
        types: of control pictures that it is given, each one as large as what is drawn.
    """
    sample = inputs["sample"]
    rows, _, height, width = sample.shape
    picture = sample.new_empty(1, 3, 8 * height, 8 * width).expand(rows, -1, -1, -1)
    shared = ("timestep", "encoder_hidden_states", "added_cond_kwargs")
    down, mid = controlnet(
        sample,
        **{name: inputs[name] for name in shared},
        controlnet_cond=[picture] * types,
        control_type=sample.new_zeros(rows, controlnet.config.num_control_type),
        control_type_idx=list(range(types)),
        conditioning_scale=[1.0] * types,
        return_dict=False,
    )
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def weights_gb(networks: dict[str, Any]) -> float:
    """In 16-bit numbers."""
    return sum(p.numel() * 2 for network in networks.values() for p in network.parameters()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        networks = meta_networks(write_configs(Path(folder)))
    weights = weights_gb(networks)
    runs = tqdm([(name, pictures) for pictures in BATCHES for name in NETWORKS], unit="pass")
    counted = [count(networks, name, pictures) for name, pictures in runs]

    machine = common.machine()
    columns = ["size_px", "pictures", "network", "bytes_per_pixel", "peak_gb", "with_weights_gb"]
    results = common.CsvFile(arguments.out / "memory.csv", [*machine, *columns])
    lines: list[tuple[object, ...]] = [
        ("pictures", "network", "bytes a pixel", "peak", "with the weights")
    ]
    for one in counted:
        total = one.peak_gb + weights
        values = (SIZE_PX, one.pictures, one.network, round(one.bytes_per_pixel))
        figures = (round(one.peak_gb, 3), round(total, 2))
        results.add({**machine, **dict(zip(columns, values + figures, strict=True))})
        lines.append((*values[1:], f"{one.peak_gb:.2f} GB", f"{total:.2f} GB"))
    print(f"{SIZE_PX} x {SIZE_PX} with guidance, 16 bits, weights {weights:.2f} GB: computed")
    print(common.markdown_table(lines))
    common.bar_chart(
        results.path.with_suffix(".png"),
        f"Peak memory at {SIZE_PX} x {SIZE_PX}, 16 bits, computed",
        "GB",
        [f"{one.network}, {one.pictures}" for one in counted],
        {"weights": [weights] * len(counted), "tensors": [one.peak_gb for one in counted]},
    )


if __name__ == "__main__":
    main()
