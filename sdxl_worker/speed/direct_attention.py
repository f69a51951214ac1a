"""A UNet's attention without what diffusers' has beside it, and the text's part of it once a stage.

diffusers' processor asks in each of 140 attentions of a pass for norms, masks and forms that SDXL
has not, divides by 1, and computes keys and values of a text that is the same in each step; and its
module looks up the processor's parameters each time. That is a fifth of the host's time of a pass.
The numbers are the same, bit for bit.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

# Of all keys and values that are kept, for they are in no plan: they come out of its margin. One
# picture with guidance takes 51 MB of it in 16 bits, for up to 75 tokens. The more there are in a
# pass, the smaller is the share of what is saved.
MOST_KEPT_BYTES = 128 * 1024**2


def attend_directly(unet: Any) -> None:
    """In place of diffusers' own processor, in a UNet whose attentions are all as SDXL's."""
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    if all(map(_is_like_sdxl, attentions)):
        unet.direct_attention = DirectAttention(unet)
        unet.set_attn_processor(unet.direct_attention)


@contextlib.contextmanager
def text_keys_kept(unet: Any) -> Iterator[None]:
    """Around one stage, in which a text's keys and values are computed once. Nothing outlasts it:
    LoRAs may change before the next.

    Not where passes are recorded or compiled, for one text's keys would be in the recording; nor
    where jobs share passes, which put their texts together anew in each step.
    """
    attention = vars(unet).get("direct_attention")
    # What offloading puts in the place of `forward` calls it.
    is_eager = "forward" not in vars(unet) or hasattr(unet, "_hf_hook")
    if attention is None or not is_eager:
        yield
        return
    attention.kept = {}
    try:
        yield
    finally:
        attention.kept = None


class DirectAttention:
    """A processor for all attentions of one UNet."""

    def __init__(self, unet: Any) -> None:
        self.kept: dict[Any, tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] | None = None
        """By attention: a text's states, their version, and their keys and values; None: nothing is
        kept."""
        self._numbers_per_token = sum(
            projection.out_features
            for name, projection in unet.named_modules()
            if name.endswith(("attn2.to_k", "attn2.to_v"))
        )

    def __call__(
        self,
        attention: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,  # noqa: ARG002  diffusers passes it, and no SDXL has one
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: [rows, places, width].
            encoder_hidden_states: of the text, [rows, tokens, its width].
        """
        query = _by_head(attention, attention.to_q(hidden_states))
        if encoder_hidden_states is None:
            key, value = _key_and_value(attention, hidden_states)
        else:
            key, value = self._of_text(attention, encoder_hidden_states)
        attended = scaled_dot_product_attention(query, key, value)
        return attention.to_out[0](attended.transpose(1, 2).flatten(2))

    # `Attention.forward` asks for it each time, and making it anew takes three times as long.
    __call__.__signature__ = inspect.signature(__call__)  # type: ignore[attr-defined]

    def _of_text(self, attention: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kept is None:
            return _key_and_value(attention, states)
        kept = self.kept.get(attention)
        if kept is None or kept[0] is not states or kept[1] != states._version:
            kept = (states, states._version, *_key_and_value(attention, states))
            rows, tokens, _ = states.shape
            if rows * tokens * self._numbers_per_token * states.itemsize <= MOST_KEPT_BYTES:
                self.kept[attention] = kept
            else:
                self.kept.clear()
        return kept[2:]


def _key_and_value(attention: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each [rows, heads, tokens, width of a head]."""
    return (
        _by_head(attention, attention.to_k(states)),
        _by_head(attention, attention.to_v(states)),
    )


def _by_head(attention: Any, states: torch.Tensor) -> torch.Tensor:
    return states.view(*states.shape[:2], attention.heads, -1).transpose(1, 2)


def _is_like_sdxl(attention: Any) -> bool:
    return (
        type(attention.processor) is AttnProcessor2_0
        and attention.group_norm is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )
