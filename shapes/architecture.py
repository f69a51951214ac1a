"""The parts of the miniature SDXL: the published block types, a thousandth the size."""

from __future__ import annotations

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

NATIVE_PX = 128
LATENT_CHANNELS = 4
LATENT_FACTOR = 8
SCALING_FACTOR = 0.13025
HIDDEN_1 = 48
HIDDEN_2 = 64
POOLED = 64
TIME_ID_WIDTH = 16
BASE_TIME_IDS = 6
REFINER_TIME_IDS = 5


SCHEDULER: dict[str, object] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
"""SDXL's own file, whole: other schedulers built from it use what the Euler one does not."""


def alphas_cumprod() -> Tensor:
    """The share of signal in the latents' variance at each of the 1000 timesteps."""
    alphas: Tensor = EulerDiscreteScheduler.from_config(SCHEDULER).alphas_cumprod
    return alphas


def text_encoder(vocabulary: int) -> CLIPTextModel:
    """The first encoder; its states condition the base only."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=HIDDEN_1,
            intermediate_size=2 * HIDDEN_1,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=HIDDEN_1,
            hidden_act="quick_gelu",
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def text_encoder_2(vocabulary: int) -> CLIPTextModelWithProjection:
    """The second encoder; its states and its pooled output condition base and refiner."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=HIDDEN_2,
            intermediate_size=2 * HIDDEN_2,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=POOLED,
            hidden_act="gelu",
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=0,
        )
    )


def vae() -> AutoencoderKL:
    """Factor 8, four channels, SDXL's scaling; pictures are taken and given in -1..1."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=NATIVE_PX,
        scaling_factor=SCALING_FACTOR,
        force_upcast=True,
    )


def base_unet() -> UNet2DConditionModel:
    """Three levels, attention at the lower two; conditioned on both encoders and on sizes."""
    return UNet2DConditionModel(
        sample_size=NATIVE_PX // LATENT_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 64, 80),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[3, 4, 5],
        cross_attention_dim=HIDDEN_1 + HIDDEN_2,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=POOLED + BASE_TIME_IDS * TIME_ID_WIDTH,
    )


def refiner_unet() -> UNet2DConditionModel:
    """Four levels, attention at the middle two; conditioned on the second encoder and a score."""
    return UNet2DConditionModel(
        sample_size=NATIVE_PX // LATENT_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 48, 32, 32),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=[3, 3, 2, 2],
        cross_attention_dim=HIDDEN_2,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=POOLED + REFINER_TIME_IDS * TIME_ID_WIDTH,
    )
