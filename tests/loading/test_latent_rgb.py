"""What colours latents stand for."""

import torch

from sdxl_worker.loading.latent_rgb import fit_latent_rgb
from tests.support import models


def test_the_map_is_fitted_to_the_decoder_that_is_loaded() -> None:
    again = fit_latent_rgb(models().vae, models().device)
    assert torch.allclose(again.weight, models().latent_rgb.weight, atol=1e-4)
    assert again.weight.shape == (4, 3)
