"""IP-Adapters: which file serves a type, what is refused and why, and that all of a file counts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_worker.errors import ModelError, RequestError
from sdxl_worker.loading import ip_adapters
from sdxl_worker.loading.ip_adapters import IpAdapterFiles, find_ip_adapter
from sdxl_worker.placement import Placement
from sdxl_worker.serving.start import put_beside
from tests.random_ip_adapters import (
    ENCODER,
    FACE,
    PLAIN,
    PLUS,
    make_encoder,
    make_ip_adapters,
    plain_adapter,
    plus_adapter,
    save,
)
from tests.support import fresh_models

FIELD = "ip_adapter[1].type"
ON_CPU = Placement(torch.device("cpu"), torch.float32, resident=True)
UNFIT = f"{FIELD}: ip-adapter_sdxl_vit-h.safetensors in the worker's IP_ADAPTER_DIR "


MODELS = fresh_models()


@pytest.fixture
def unet() -> Any:
    return MODELS.unet


@pytest.fixture
def folder(unet: Any, tmp_path: Path) -> Path:
    make_ip_adapters(tmp_path, unet)
    return tmp_path


def found(kind: str, folder: Path | None) -> IpAdapterFiles:
    return find_ip_adapter(kind, folder, FIELD, MODELS.unet)


def refusal(kind: str, folder: Path | None) -> str:
    with pytest.raises(RequestError) as caught:
        find_ip_adapter(kind, folder, FIELD, MODELS.unet)
    return str(caught.value)


def load_refusal(files: Any) -> str:
    with pytest.raises(ModelError) as caught:
        files.load(ON_CPU)
    return str(caught.value)


class TestWhichFileServesAType:
    @pytest.mark.parametrize(
        ("kind", "file"),
        [("plain", PLAIN), ("plus", PLUS), ("face", FACE), ("style", PLUS), ("layout", PLUS)],
    )
    def test_each_has_its_own_as_the_hub_names_them(
        self, folder: Path, kind: str, file: str
    ) -> None:
        files = found(kind, folder)
        assert (files.path, files.encoder.folder) == (folder / file, folder / ENCODER)
        assert files.key == folder / file

    def test_style_and_layout_take_the_plain_one_where_there_is_no_plus(self, folder: Path) -> None:
        (folder / PLUS).unlink()
        assert found("style", folder).path == found("layout", folder).path == folder / PLAIN

    def test_files_may_lie_in_the_folder_itself(self, folder: Path) -> None:
        (folder / PLUS).rename(folder / Path(PLUS).name)
        (folder / ENCODER).rename(folder / "image_encoder")
        files = found("plus", folder)
        assert files.path.parent == folder
        assert files.encoder.folder == folder / "image_encoder"

    def test_the_encoder_is_the_one_whose_features_it_takes(self, unet: Any, folder: Path) -> None:
        """Of two that differ in width, as ViT-H and ViT-bigG do."""
        (folder / PLAIN).unlink()
        save(plain_adapter(unet, features=40), folder / "sdxl_models/ip-adapter_sdxl.safetensors")
        make_encoder(folder / "sdxl_models/image_encoder", hidden_size=64, projection_dim=40)
        assert found("plain", folder).encoder.folder == folder / "sdxl_models/image_encoder"
        assert found("plus", folder).encoder.folder == folder / ENCODER

    def test_the_encoder_s_weights_may_be_in_half_precision(self, folder: Path) -> None:
        weights = folder / ENCODER / "model.safetensors"
        weights.rename(weights.with_name("model.fp16.safetensors"))
        encoder = found("plain", folder).encoder
        assert encoder.size_bytes(torch.float32) > 0
        encoder.load(ON_CPU)


class TestWhatIsRefused:
    def test_without_a_folder_the_caller_is_told_of_the_setting(self) -> None:
        assert refusal("plus", None) == (
            f"{FIELD}: this worker has no IP-Adapters; its owner can set IP_ADAPTER_DIR"
        )

    def test_without_the_setting_those_of_the_image_are_found(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ip_adapters, "BAKED_IP_ADAPTER_DIR", folder)
        assert found("plus", None).path == folder / PLUS

    def test_of_a_type_that_is_not_there_the_others_are_named(self, folder: Path) -> None:
        (folder / FACE).unlink()
        assert refusal("face", folder) == (
            f'{FIELD}: this worker has no IP-Adapter of type "face", only of plus, plain, style, '
            "layout; its owner can put ip-adapter-plus-face_sdxl_vit-h.safetensors into "
            "IP_ADAPTER_DIR/sdxl_models"
        )

    def test_a_pickle_is_never_read(self, folder: Path) -> None:
        (folder / PLAIN).rename((folder / PLAIN).with_suffix(".bin"))
        assert (
            "; ip-adapter_sdxl_vit-h.bin is a pickle, which can run any code, and is not read; "
            "its owner can put ip-adapter_sdxl_vit-h.safetensors into IP_ADAPTER_DIR/sdxl_models"
        ) in refusal("plain", folder)

    @pytest.mark.parametrize(
        "name", ["ip-adapter-faceid_sdxl.safetensors", "InstantID.safetensors"]
    )
    def test_what_needs_insightface_is_not_served(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"")
        assert (
            f"; {name} needs insightface's models, which are not for commercial use, and is not "
            "served"
        ) in refusal("face", tmp_path)

    @pytest.mark.parametrize(
        "first", ["image_proj.proj.0.weight", "image_proj.perceiver_resampler.a"]
    )
    def test_nor_is_it_by_another_name(self, unet: Any, folder: Path, first: str) -> None:
        save({**plain_adapter(unet), first: torch.zeros(1)}, folder / PLAIN)
        assert refusal("plain", folder).startswith(UNFIT + "is a FaceID adapter")

    def test_an_adapter_of_stable_diffusion_1_5(self, unet: Any, folder: Path) -> None:
        tensors = plain_adapter(unet)
        for name in [name for name in tensors if name.startswith("ip_adapter.")]:
            tensors[name] = torch.zeros(320, 768)
        save(tensors, folder / PLAIN)
        assert refusal("plain", folder) == (
            UNFIT + "is for Stable Diffusion 1.5; its owner can put the one for SDXL there"
        )

    def test_an_adapter_of_another_model(self, folder: Path) -> None:
        save(plain_adapter(MODELS.refiner_unet), folder / PLAIN)
        assert refusal("plain", folder) == (
            UNFIT + "is for another kind of model: for 7 cross-attentions to a width of 64, and "
            "this model's UNet has 7 cross-attentions to a width of 112; name another model, or "
            "leave ip_adapter out"
        )

    @pytest.mark.parametrize(
        "tensors",
        [
            {"lora_up.weight": torch.zeros(4, 4)},
            {"image_proj.proj.weight": torch.zeros(8, 4), "image_proj.norm.weight": torch.zeros(0)},
            {"image_proj.latents": torch.zeros(1)},
            {
                "image_proj.proj.3.weight": torch.zeros(4),
                "image_proj.proj.0.weight": torch.zeros(4),
            },
        ],
        ids=["a LoRA", "no numbers", "no shape", "full face"],
    )
    def test_what_is_something_else(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        save(tensors, folder / PLAIN)
        assert refusal("plain", folder) == (
            UNFIT + "is no IP-Adapter of a form that this worker knows: plain or plus"
        )

    def test_a_projection_without_attentions(self, unet: Any, folder: Path) -> None:
        tensors = plain_adapter(unet)
        del tensors["ip_adapter.3.to_v_ip.weight"]
        save(tensors, folder / PLAIN)
        assert "is no IP-Adapter of a form" in refusal("plain", folder)

    def test_what_is_no_safetensors_file(self, folder: Path) -> None:
        (folder / PLAIN).write_bytes(b"PK\x03\x04 data.pkl")
        assert refusal("plain", folder).startswith(UNFIT + "is a PyTorch pickle")

    def test_an_adapter_without_its_encoder(self, folder: Path) -> None:
        shutil.rmtree(folder / ENCODER)
        assert refusal("plain", folder) == (
            UNFIT + "needs an image encoder with a projection_dim of 24, in CLIP's layout with its "
            "config.json: the worker's owner can put it into IP_ADAPTER_DIR/models/image_encoder, "
            "or, where it is ViT-bigG, into IP_ADAPTER_DIR/sdxl_models/image_encoder"
        )
        assert "an image encoder with a hidden_size of 32" in refusal("plus", folder)

    @pytest.mark.parametrize("config", ["{", "[]", '{"projection_dim": 25}'])
    def test_an_adapter_beside_another_encoder(self, folder: Path, config: str) -> None:
        (folder / ENCODER / "config.json").write_text(config, encoding="utf-8")
        assert "needs an image encoder with a projection_dim of 24" in refusal("plain", folder)

    def test_an_encoder_without_weights(self, folder: Path) -> None:
        weights = folder / ENCODER / "model.safetensors"
        weights.rename(weights.with_name("pytorch_model.bin"))
        assert refusal("plain", folder) == (
            UNFIT + "needs the weights of its image encoder: the worker's owner can put "
            "model.safetensors into IP_ADAPTER_DIR/models/image_encoder"
        )


class TestLoading:
    def test_every_number_of_a_file_is_loaded_in_the_model_s_format(self, folder: Path) -> None:
        for kind, path in {"plain": PLAIN, "plus": PLUS}.items():
            files = found(kind, folder)
            for one in (files, files.encoder):
                module = one.load(Placement(torch.device("cpu"), torch.bfloat16, resident=True))
                parameters = list(module.parameters())
                assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
                size = sum(parameter.nbytes for parameter in parameters)
                assert one.size_bytes(torch.bfloat16) == size
            assert sum(it.numel() for it in files.load(ON_CPU).parameters()) == sum(
                it.numel() for it in load_file(folder / path).values()
            )

    @pytest.mark.parametrize("blocks", [2, 12])
    def test_a_resampler_may_have_any_number_of_blocks(
        self, unet: Any, folder: Path, blocks: int
    ) -> None:
        """diffusers makes it of 4."""
        save(plus_adapter(unet, blocks=blocks), folder / PLUS)
        adapter: Any = found("plus", folder).load(ON_CPU)
        assert len(adapter.projection.layers) == blocks

    def test_files_that_older_programs_wrote_are_read(self, folder: Path) -> None:
        path = folder / ENCODER / "model.safetensors"
        tensors = load_file(path)
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(tensors, path)
        encoder: Any = found("plain", folder).encoder.load(ON_CPU)
        assert encoder(torch.zeros(1, 3, 32, 32)).image_embeds.shape == (1, 24)

    def test_what_is_missing_in_a_file_is_named_with_the_setting(
        self, unet: Any, folder: Path
    ) -> None:
        tensors = plus_adapter(unet)
        del tensors["image_proj.layers.1.0.to_out.weight"]
        save(tensors, folder / PLUS)
        message = load_refusal(found("plus", folder))
        assert message.startswith(f"IP_ADAPTER_DIR: {folder / PLUS} cannot be loaded: ")
        assert "layers.1.attn.to_out.0.weight" in message

    def test_a_job_is_not_told_where_on_the_worker_it_lies(self, unet: Any, folder: Path) -> None:
        files = found("plus", folder)
        tensors = plus_adapter(unet)
        del tensors["image_proj.layers.1.0.to_out.weight"]
        save(tensors, folder / PLUS)
        config = folder / ENCODER / "config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text("utf-8")) | {"num_hidden_layers": 4})
        )
        for one, title in (
            (files, "the IP-Adapter ip-adapter-plus_sdxl_vit-h"),
            (files.encoder, "the image encoder models/image_encoder"),
        ):
            with pytest.raises(RequestError) as caught:
                put_beside(MODELS, [one])
            assert str(caught.value) == (
                f"{title} cannot be loaded; the worker's owner should fetch it again"
            )

    def test_so_is_an_encoder_that_is_not_as_its_configuration_says(self, folder: Path) -> None:
        path = folder / ENCODER / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"num_hidden_layers": 4}), encoding="utf-8")
        message = load_refusal(found("plain", folder).encoder)
        assert message.startswith(f"IP_ADAPTER_DIR: {folder / ENCODER} cannot be loaded: ")

    def test_and_a_file_that_was_cut_since_it_was_found(self, folder: Path) -> None:
        files = found("plain", folder)
        both: dict[str, Any] = {PLAIN: files, f"{ENCODER}/model.safetensors": files.encoder}
        for path, one in both.items():
            (folder / path).write_bytes((folder / path).read_bytes()[:-100])
            assert load_refusal(one).startswith(f"IP_ADAPTER_DIR: {Path(path).name} cannot be read")
            with pytest.raises(ModelError, match="IP_ADAPTER_DIR: .* cut off"):
                one.size_bytes(torch.float32)
