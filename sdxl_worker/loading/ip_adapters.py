"""The IP-Adapters of `IP_ADAPTER_DIR`, in the layout of `h94/IP-Adapter`, and the encoders of their
pictures (https://arxiv.org/abs/2308.06721).
"""

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection

from sdxl_worker.errors import BrokenFilesError, RequestError
from sdxl_worker.loading.companions import count_numbers, read_tensors
from sdxl_worker.loading.networks import Network
from sdxl_worker.placement import Placement
from sdxl_worker.safetensors_header import NotSafetensorsError, read_header

_SETTING = "IP_ADAPTER_DIR"
BAKED_IP_ADAPTER_DIR = Path("/models/ip-adapters")

_PLAIN = ("ip-adapter_sdxl_vit-h", "ip-adapter_sdxl")
_PLUS = ("ip-adapter-plus_sdxl_vit-h",)
# The files that serve a type, the first choice first.
FILES = {
    "plus": _PLUS,
    "plain": _PLAIN,
    "face": ("ip-adapter-plus-face_sdxl_vit-h",),
    "style": _PLUS + _PLAIN,
    "layout": _PLUS + _PLAIN,
}
FOLDERS = ("sdxl_models", "")
ENCODER_FOLDERS = ("models/image_encoder", "sdxl_models/image_encoder", "image_encoder")
ENCODER_FILES = ("model.safetensors", "model.fp16.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Both see faces by insightface's models, which are not for commercial use.
OF_INSIGHTFACE = re.compile("face-?id|instant-?id", re.IGNORECASE)

SD15_WIDTH = 768  # of what a UNet's cross-attention attends to

# The parts of a block of the resampler, by the names of the files.
_OF_BLOCKS = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}
_HEAD_WIDTH = 64  # of the resampler; no file tells it

_OF_FACE_ID = ("image_proj.perceiver_resampler.", "image_proj.proj.0.")


class _UnfitError(Exception):
    """The message says what is wrong with a file, to be put after its name."""


@dataclass(frozen=True)
class Form:
    """What the shapes of an IP-Adapter's tensors tell."""

    sees_patches: bool
    """Whether it takes the encoder's features of each patch of the picture, or of the whole."""
    features: int
    """Their width."""
    tokens: int
    """That a picture becomes."""
    attentions: tuple[tuple[int, int], ...]
    """Of the UNet, in its own order: width, and width of what it attends to."""

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Form":
        """
        Raises:
            _UnfitError: they are not those of an IP-Adapter that can be served.
        """
        is_face_id = any(name.startswith(_OF_FACE_ID) for name in shapes)
        if is_face_id and "image_proj.proj.3.weight" not in shapes:
            raise _UnfitError(
                "is a FaceID adapter, which needs insightface's models: they are not for "
                "commercial use, and it is not served"
            )
        try:
            if "image_proj.latents" in shapes:
                _, tokens, _ = shapes["image_proj.latents"]
                _, features = shapes["image_proj.proj_in.weight"]
                sees_patches = True
            else:
                numbers, features = shapes["image_proj.proj.weight"]
                tokens = numbers // shapes["image_proj.norm.weight"][0]
                sees_patches = False
            attentions = []
            for number in _numbers_of_attentions(shapes):
                width, attended = shapes[f"ip_adapter.{number}.to_k_ip.weight"]
                if shapes[f"ip_adapter.{number}.to_v_ip.weight"] != (width, attended):
                    raise ValueError
                attentions.append((width, attended))
        except (KeyError, ValueError, IndexError, ZeroDivisionError):
            attentions = []
        if not attentions:
            raise _UnfitError("is no IP-Adapter of a form that this worker knows: plain or plus")
        return cls(sees_patches, features, tokens, tuple(attentions))


@dataclass(frozen=True)
class ImageEncoderFiles:
    """`CompanionFiles` of the encoder of an IP-Adapter's pictures."""

    folder: Path

    @property
    def key(self) -> Hashable:
        return self.folder

    @property
    def title(self) -> str:
        return f"the image encoder {self.folder.parent.name}/{self.folder.name}"

    @property
    def path(self) -> Path | None:
        paths = [self.folder / name for name in ENCODER_FILES]
        return next((path for path in paths if path.is_file()), None)

    def size_bytes(self, dtype: torch.dtype) -> int:
        return count_numbers([self._path()], _SETTING) * dtype.itemsize

    def load(self, placement: Placement) -> torch.nn.Module:
        tensors = read_tensors([self._path()], placement, _SETTING)
        try:
            kind = "transformers.CLIPVisionModelWithProjection"
            module: Any = Network("image_encoder", kind).build(self.folder)
            # Files that older versions of transformers wrote have them.
            tensors.pop("vision_model.embeddings.position_ids", None)
            module.load_state_dict(tensors, assign=True)
        except Exception as error:  # whatever a wrong configuration raises
            raise _cannot_be_loaded(self.folder, error) from error
        embeddings = module.vision_model.embeddings
        # The one buffer that no file holds.
        positions = torch.arange(embeddings.num_positions, device=module.device)
        embeddings.position_ids = torch.nn.Buffer(positions.expand((1, -1)), persistent=False)
        return module

    def _path(self) -> Path:
        if self.path is None:
            raise BrokenFilesError(f"{_SETTING}: {self.folder} has no {ENCODER_FILES[0]}")
        return self.path


@dataclass(frozen=True)
class IpAdapterFiles:
    """`CompanionFiles` of an IP-Adapter."""

    path: Path
    form: Form
    encoder: ImageEncoderFiles

    @property
    def key(self) -> Hashable:
        return self.path

    @property
    def title(self) -> str:
        return f"the IP-Adapter {self.path.stem}"

    def size_bytes(self, dtype: torch.dtype) -> int:
        return count_numbers([self.path], _SETTING) * dtype.itemsize

    def load(self, placement: Placement) -> "IpAdapter":
        tensors = read_tensors([self.path], placement, _SETTING)
        try:
            with torch.device("meta"):
                adapter = IpAdapter(self.form, _projection(self.form, tensors))
            adapter.load_state_dict(_with_library_names(tensors), assign=True)
        except Exception as error:  # whatever a tensor that is missing raises
            raise _cannot_be_loaded(self.path, error) from error
        return adapter.eval().requires_grad_(False)


class IpAdapter(torch.nn.Module):
    """What a file holds: it is not called as a whole."""

    def __init__(self, form: Form, projection: torch.nn.Module) -> None:
        super().__init__()
        self.form = form
        self.projection = projection
        """Of the encoder's features, [n, width] or [n, patches, width], gives [n, tokens, width of
        what the UNet attends to]."""
        self.to_k, self.to_v = (
            torch.nn.ModuleList(
                torch.nn.Linear(attended, width, bias=False) for width, attended in form.attentions
            )
            for _ in range(2)
        )


def attentions_to_text(unet: Any) -> list[Any]:
    """A UNet's cross-attentions, in the order that files count them."""
    return [module for name, module in unet.named_modules() if name.endswith(".attn2")]


def find_ip_adapter(kind: str, folder: Path | None, field: str, unet: Any) -> IpAdapterFiles:
    """
    Args:
        kind: as `ImagePromptField.type`.
        folder: `IP_ADAPTER_DIR`. None: that of the image, if it has one.
        field: of the request, for messages.
        unet: that is drawn with. Its weights may be elsewhere.

    Raises:
        RequestError: there is none of this kind, and the message tells which there are; or it
            cannot be served, or not with this UNet.
    """
    folder = folder or (BAKED_IP_ADAPTER_DIR if BAKED_IP_ADAPTER_DIR.is_dir() else None)
    if folder is None:
        raise RequestError(
            f"{field}: this worker has no IP-Adapters; its owner can set IP_ADAPTER_DIR"
        )
    path = next(_paths(kind, folder), None)
    if path is None:
        raise RequestError(f"{field}: {_what_is_there_instead(kind, folder)}")
    try:
        shapes = read_header(path).shapes
        form = Form.of(shapes)
        _check_fits(form, unet)
        return IpAdapterFiles(path, form, _encoder(form, folder))
    except NotSafetensorsError as error:
        problem = f"is {error}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except _UnfitError as error:
        problem = str(error)
    raise RequestError(f"{field}: {path.name} in the worker's IP_ADAPTER_DIR {problem}")


def _paths(kind: str, folder: Path, ending: str = ".safetensors") -> Iterator[Path]:
    for name in FILES[kind]:
        for parent in FOLDERS:
            path = folder / parent / f"{name}{ending}"
            if path.is_file():
                yield path


def _what_is_there_instead(kind: str, folder: Path) -> str:
    kinds = [other for other in FILES if next(_paths(other, folder), None)]
    wanted = f"{FILES[kind][0]}.safetensors"
    parts = [
        f'this worker has no IP-Adapter of type "{kind}"'
        + (f", only of {', '.join(kinds)}" if kinds else "")
    ]
    pickles = [path.name for ending in PICKLES for path in _paths(kind, folder, ending)]
    if pickles:
        parts.append(f"{pickles[0]} is a pickle, which can run any code, and is not read")
    others = [
        path.name
        for parent in FOLDERS
        if (folder / parent).is_dir()
        for path in sorted((folder / parent).iterdir())
        if OF_INSIGHTFACE.search(path.name)
    ]
    if others and not kinds:
        parts.append(
            f"{others[0]} needs insightface's models, which are not for commercial use, and is "
            "not served"
        )
    parts.append(f"its owner can put {wanted} into IP_ADAPTER_DIR/{FOLDERS[0]}")
    return "; ".join(parts)


def _check_fits(form: Form, unet: Any) -> None:
    """
    Raises:
        _UnfitError: an adapter was made for UNets of another shape.
    """
    attentions = attentions_to_text(unet)
    has = tuple((one.to_k.out_features, one.to_k.in_features) for one in attentions)
    if has == form.attentions:
        return
    if any(attended == SD15_WIDTH for _, attended in form.attentions):
        raise _UnfitError("is for Stable Diffusion 1.5; its owner can put the one for SDXL there")
    raise _UnfitError(
        f"is for another kind of model: for {_in_words(form.attentions)}, and this model's UNet "
        f"has {_in_words(has)}; name another model, or leave ip_adapter out"
    )


def _encoder(form: Form, folder: Path) -> ImageEncoderFiles:
    """The one whose features an adapter takes.

    Raises:
        _UnfitError: it is not there.
    """
    # Those of transformers, where a configuration leaves them out.
    key, default = ("hidden_size", 768) if form.sees_patches else ("projection_dim", 512)
    wanted = f"an image encoder with a {key} of {form.features}"
    for name in ENCODER_FOLDERS:
        try:
            config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
            fits = config.get(key, default) == form.features
        except (OSError, ValueError, AttributeError):
            continue
        if fits:
            files = ImageEncoderFiles(folder / name)
            if files.path is None:
                raise _UnfitError(
                    f"needs the weights of its image encoder: the worker's owner can put "
                    f"{ENCODER_FILES[0]} into IP_ADAPTER_DIR/{name}"
                )
            return files
    raise _UnfitError(
        f"needs {wanted}, in CLIP's layout with its config.json: the worker's owner can put it "
        f"into IP_ADAPTER_DIR/{ENCODER_FOLDERS[0]}, or, where it is ViT-bigG, into "
        f"IP_ADAPTER_DIR/{ENCODER_FOLDERS[1]}"
    )


def _in_words(attentions: tuple[tuple[int, ...], ...]) -> str:
    attended = sorted({shape[-1] for shape in attentions})
    return f"{len(attentions)} cross-attentions to a width of {' and '.join(map(str, attended))}"


def _numbers_of_attentions(names: Mapping[str, Any]) -> list[str]:
    """The names of a file count all attentions of a UNet, the cross-attentions being the odd ones:
    1, 3, 5 and so on."""
    found = [re.fullmatch(r"ip_adapter\.(\d{1,4})\.to_k_ip\.weight", name) for name in names]
    return sorted((match[1] for match in found if match), key=int)


def _projection(form: Form, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Without weights. diffusers makes it of 4 blocks, whatever the file has."""
    attended = form.attentions[0][1]
    if not form.sees_patches:
        return ImageProjection(form.features, attended, form.tokens)
    blocks = {name.split(".")[2] for name in tensors if name.startswith("image_proj.layers.")}
    width = tensors["image_proj.latents"].shape[2]
    return IPAdapterPlusImageProjection(
        embed_dims=form.features,
        output_dims=attended,
        hidden_dims=width,
        depth=len(blocks),
        dim_head=_HEAD_WIDTH,
        heads=tensors["image_proj.layers.0.0.to_q.weight"].shape[0] // _HEAD_WIDTH,
        num_queries=form.tokens,
        ffn_ratio=tensors["image_proj.layers.0.1.1.weight"].shape[0] / width,
    )


def _with_library_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file by the names that `IpAdapter` has for them."""
    renamed = {}
    for i, number in enumerate(_numbers_of_attentions(tensors)):
        renamed[f"to_k.{i}.weight"] = tensors[f"ip_adapter.{number}.to_k_ip.weight"]
        renamed[f"to_v.{i}.weight"] = tensors[f"ip_adapter.{number}.to_v_ip.weight"]
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if first != "image_proj":
            continue
        in_block = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", rest)
        if in_block is None:
            rest = re.sub(r"^proj\.", "image_embeds.", rest)
            renamed[f"projection.{rest}"] = tensor
            continue
        block, part, which = in_block.groups()
        prefix = f"projection.layers.{block}"
        if part == "0.to_kv":  # keys and values in one
            for key_or_value, half in zip("kv", tensor.chunk(2), strict=True):
                renamed[f"{prefix}.attn.to_{key_or_value}.{which}"] = half
        else:
            renamed[f"{prefix}.{_OF_BLOCKS.get(part, part)}.{which}"] = tensor
    return renamed


def _cannot_be_loaded(path: Path, error: Exception) -> BrokenFilesError:
    return BrokenFilesError(f"{_SETTING}: {path} cannot be loaded: {error}")
