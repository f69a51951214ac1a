"""SDXL in numbers."""

import json
from typing import Any

import pytest
from transformers import CLIPTextConfig

from sdxl_worker.loading.networks import NETWORKS
from tests.support import REPOSITORY

PUBLISHED = REPOSITORY.parent / "shared" / "sdxl-1.0"


def test_the_networks_have_as_many_parameters_as_the_published_ones(
    networks: dict[str, Any],
) -> None:
    counted = {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in networks.items()
    }
    assert counted == {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "refiner_unet": 2_259_526_660,
    }


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published configurations are not here")
@pytest.mark.parametrize(
    ("name", "folder"), [(name, network.folder) for name, network in NETWORKS.items()]
)
def test_the_numbers_are_those_of_the_published_configurations(
    name: str, folder: str, networks: dict[str, Any]
) -> None:
    published = json.loads((PUBLISHED / folder / "config.json").read_text())
    ours = networks[name].config
    ours = ours.to_dict() if isinstance(ours, CLIPTextConfig) else dict(ours)
    told_elsewhere = {"torch_dtype", "transformers_version", "architectures", "force_upcast"}
    told_elsewhere |= {key for key in published if key.startswith("_")}
    different = {
        key: (value, ours.get(key))
        for key, value in published.items()
        # Where one says null the other may say false.
        if key not in told_elsewhere and (value or None) != (_plain(ours.get(key)) or None)
    }
    # The layers' behaviour in training and ids that the tokenizers give.
    assert not {key for key in different if key not in ("dropout", "pad_token_id")}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
