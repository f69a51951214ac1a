"""What a file is that is no LoRA for SDXL, told from its header."""

import re

from sdxl_worker.safetensors_header import SafetensorsHeader

ADVICE = "use a LoRA that was made for SDXL"
# Where trainers note the model that they started from.
BASE_MODEL_KEYS = ("modelspec.architecture", "ss_base_model_version")
# All that is read of such a note, for which they use a word or two. Looking for what is below
# takes the square of its length.
MAX_NOTED_CHARACTERS = 200
# By what they note; the first that is found. Spellings:
# https://github.com/Stability-AI/ModelSpec, https://github.com/kohya-ss/sd-scripts
BASE_MODELS = (
    (r"(xl|sdxl).*refiner", "the refiner of SDXL"),
    (r"stable-diffusion-v1|sd_?v?1", "Stable Diffusion 1.x"),
    (r"stable-diffusion-v2|sd_?v?2", "Stable Diffusion 2.x"),
    (r"stable-diffusion-v?3|sd_?v?3", "Stable Diffusion 3"),
    (r"flux", "Flux"),
    (r"cascade", "Stable Cascade"),
    (r"hunyuan", "Hunyuan"),
    (r"^wan", "Wan"),
    (r"qwen", "Qwen-Image"),
    (r"lumina", "Lumina"),
    (r"chroma", "Chroma"),
)
# By names that only they have.
BASE_MODEL_NAMES = (
    (r"lora_prior_", "Stable Cascade"),
    (r"img_mlp|txt_mlp", "Qwen-Image, or a model like it"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "Flux, or a model like it"),
    (r"joint_blocks|attn[._]add_[kqv]_proj|lora_te3_", "Stable Diffusion 3"),
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn", "Wan, or a model like it"),
)
# By the width of the text that a UNet attends to.
TEXT_WIDTHS = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "the refiner of SDXL",
    2048: "SDXL in its full size",
}
OTHER_FILES = (
    (
        r"^(model\.diffusion_model|first_stage_model|conditioner|cond_stage_model)\.",
        "a whole checkpoint, not a LoRA; it can be served as a model",
    ),
    (
        r"^lora_controlnet$|^(control_model|controlnet)|cond_embedding|input_hint_block|zero_conv",
        "a ControlNet, not a LoRA",
    ),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter, not a LoRA"),
    (
        r"^(clip_l|clip_g|emb_params)$|^string_to_param",
        "a textual inversion, not a LoRA; give it as one of `embeddings`",
    ),
    (
        r"^bundle_emb\.",
        "a LoRA with a textual inversion in it (keys `bundle_emb...`), which would be left out; "
        "save them as two files, and give the second as one of `embeddings`",
    ),
    (r"\.oft_(blocks|diag|r)\b", "of the format OFT, which is not served; train a LoRA instead"),
    (r"\.(a1|b1)\.weight$", "of the format GLoRA, which is not served; train a LoRA instead"),
)
# Files of whole networks have no key but of these.
WEIGHTS = re.compile(r"(.+)\.(weight|bias)|(.+\.)?(position_ids|positional_embedding|logit_scale)")
NETWORKS = (
    (r"^(encoder|decoder)\.(down|up|mid|conv_in)", "a VAE"),
    (r"^(down_blocks|input_blocks)\.", "the weights of a UNet"),
    (r"(^|\.)(text_model|resblocks)\.", "the weights of a text encoder"),
)


def foreign_kind(header: SafetensorsHeader) -> str | None:
    """To be put after "FILE is "; None if nothing shows that it is not for SDXL."""
    if not header.shapes:
        return "a file without tensors, not a LoRA"
    keys = "\n".join(header.shapes)

    def first(patterns: tuple[tuple[str, str], ...]) -> str | None:
        return next((what for it, what in patterns if re.search(it, keys, re.M | re.I)), None)

    if other := first(OTHER_FILES):
        return other
    if "lora" not in keys and all(map(WEIGHTS.fullmatch, header.shapes)):
        network = first(NETWORKS)
        return f"{network or 'a network'}, not a LoRA"
    base_model = _noted(header) or first(BASE_MODEL_NAMES)
    return base_model and f"for {base_model}, not for SDXL; {ADVICE}"


def of_text_width(width: int, own: int) -> str:
    """What a file is whose UNet attends to texts of another width, as above."""
    model = TEXT_WIDTHS.get(width)
    if model and own in TEXT_WIDTHS:
        return f"for {model}, not for SDXL; {ADVICE}"
    return (
        f"for a model of other sizes{f' ({model})' if model else ''}: its text is {width} numbers "
        f"wide, that of this worker's model {own}; use a LoRA that was made for this model"
    )


def _noted(header: SafetensorsHeader) -> str | None:
    notes = [header.metadata.get(key, "")[:MAX_NOTED_CHARACTERS] for key in BASE_MODEL_KEYS]
    noted = "\n".join(notes)
    return next((model for it, model in BASE_MODELS if re.search(it, noted, re.M | re.I)), None)
