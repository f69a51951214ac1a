"""Small networks with random weights, in transformers layout."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch


def save_depth_network(folder: Path) -> None:
    """As Depth-Anything-V2-Small, but a thousandth of it."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(0)
    config = DepthAnythingConfig(
        backbone_config=Dinov2Config(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            mlp_ratio=1,
            image_size=518,
            patch_size=14,
            out_indices=[1, 2, 3, 4],
            reshape_hidden_states=False,
            apply_layernorm=True,
        ),
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    network = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        # So that its last ReLU leaves something, and what it leaves is not all the same.
        network.head.conv3.weight.fill_(1000)
        network.head.conv3.bias.fill_(1)
    network.save_pretrained(folder)


def save_classifier(
    folder: Path,
    labels: Sequence[str] = ("normal", "nsfw"),
    *,
    likeliest: str | None = "normal",
    flags_bright: bool = False,
) -> None:
    """As Falconsai's, but a thousandth of it.

    Args:
        likeliest: the label that it gives to every picture.
        flags_bright: the last label for bright pictures, the first for dark ones.
    """
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    network = ViTForImageClassification(config)
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.zero_()
        if flags_bright:
            of_brightness(network)
        elif likeliest is not None:
            network.classifier.bias[labels.index(likeliest)] = 5
    network.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def of_brightness(network: torch.nn.Module) -> None:
    """Its last label is the likelier the brighter a picture is: found by what it makes of white and
    of black ones."""
    vit, classifier = network.vit, network.classifier
    network.eval()
    white, black = (
        vit(pixel_values=torch.full((1, 3, 32, 32), value)).last_hidden_state[0, 0]
        for value in (1.0, -1.0)
    )
    direction = white - black
    classifier.weight[-1] = direction
    classifier.bias[-1] = -direction @ (white + black) / 2
