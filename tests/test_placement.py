"""What fits the card."""

from sdxl_worker.placement import WORKING_MEMORY_BYTES, fits


def test_models_stay_on_the_card_where_they_fit() -> None:
    weights = 11_460_000_000
    assert fits(weights, weights + WORKING_MEMORY_BYTES)
    assert not fits(weights, weights + WORKING_MEMORY_BYTES - 1)


def test_the_weights_of_sdxl_fit_a_card_of_24_gb_and_not_one_of_16() -> None:
    sdxl_bytes = 11_460_000_000
    assert fits(sdxl_bytes, 23_000_000_000)
    assert not fits(sdxl_bytes, 16_000_000_000)
