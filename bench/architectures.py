"""Networks by name, with random weights and small inputs: torchvision, timm, Hugging Face.

``torchvision:resnet50``, ``timm:davit_tiny``, ``hf:llama``.  Hugging Face models are tiny: every
configuration gets the same widths, chosen so that no two of them are equal by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# A small one of every family, cheap ones first.
TIMM = (
    "convnext_atto", "convnextv2_atto", "mobilevit_xxs", "edgenext_xx_small", "lcnet_035",
    "deit_tiny_patch16_224", "mobilenetv2_035", "mobilenetv3_small_050", "cs3darknet_s",
    "fasternet_t0", "resnet18", "regnetx_002", "regnety_002", "ese_vovnet19b_dw", "fastvit_t8",
    "poolformer_s12", "pvt_v2_b0", "vit_tiny_patch16_224", "xcit_nano_12_p16_224", "pit_ti_224",
    "mixer_s32_224", "convit_tiny", "mobilevitv2_050", "mobileone_s0", "repvgg_a0", "tinynet_e",
    "mnasnet_050", "semnasnet_050", "spnasnet_100", "starnet_s050", "shvit_s1", "efficientvit_m0",
    "efficientvit_b0", "eva02_tiny_patch14_224", "levit_128s", "gernet_s", "hgnetv2_b0",
    "hardcorenas_a", "fbnetc_100", "inception_next_atto", "mambaout_femto", "efficientnet_b0",
    "mobilenetv4_conv_small_035", "mixnet_s", "gmlp_ti16_224", "crossvit_9_240", "cait_xxs24_224",
    "beit_base_patch16_224", "coat_tiny", "coatnet_nano_rw_224", "davit_tiny", "dla34",
    "densenet121", "dpn48b", "botnet26t_256", "efficientformer_l1", "efficientformerv2_s0",
    "focalnet_tiny_srf", "gcvit_xxtiny", "gcresnet33ts", "ghostnet_050", "ghostnetv2_100",
    "gmixer_24_224", "hiera_tiny_224", "hrnet_w18_small", "lambda_resnet26t",
    "legacy_seresnet18", "maxvit_tiny_rw_224", "mvitv2_tiny", "nest_tiny", "nf_regnet_b0",
    "nf_resnet26", "resmlp_12_224", "resnest14d", "res2net50_14w_8s", "resnetv2_18", "rexnet_100",
    "repghostnet_050", "repvit_m0_9", "seresnet18", "selecsls42", "skresnet18", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224",
    "tiny_vit_5m_224", "tnt_s_patch16_224", "tresnet_m", "twins_svt_small", "twins_pcpvt_small",
    "visformer_tiny", "vitamin_small_224", "volo_d1_224", "samvit_base_patch16_224",
    "nextvit_small", "rdnet_tiny", "sequencer2d_s", "cspnext_tiny", "efficientvim_m1", "iformer_t",
    "cpubone_nano", "csatv2", "lcnetv2_small", "lowformer_b0", "vit_relpos_small_patch16_224",
    "qwen3_vit_88m", "naflexvit_base_patch16_gap", "nasnetalarge", "convmixer_768_32",
    "maxxvit_rmlp_nano_rw_256", "bat_resnext26ts", "halonet26t", "haloregnetz_b", "hgnet_tiny",
    "hieradet_small", "inception_v3", "inception_v4", "cspresnet50", "efficientnetv2_rw_t",
    "deit3_small_patch16_224", "regnetv_040", "resnetrs50", "resnext26ts", "rexnetr_100",
    "sebotnet33ts_256", "tf_efficientnet_lite0", "vgg11", "wide_resnet50_2", "xception41",
    "pnasnet5large",
)  # fmt: skip

# Fewer blocks and narrower ones, where a family has no small member.
_NARROW: dict[str, Any] = {"embed_dim": 192, "depth": 4, "num_heads": 3}
TIMM_OPTIONS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": _NARROW,
    "eva02_tiny_patch14_224": {"depth": 4},
    "cait_xxs24_224": {"depth": 4},
    "naflexvit_base_patch16_gap": _NARROW,
    "nasnetalarge": {"num_features": 672, "stem_size": 24},
    "qwen3_vit_88m": _NARROW,
    "samvit_base_patch16_224": {**_NARROW, "global_attn_indexes": (1, 3)},
    "vit_relpos_small_patch16_224": {"depth": 4},
    "deit_tiny_patch16_224": {"depth": 4},
    "deit3_small_patch16_224": {"depth": 4},
    "vit_tiny_patch16_224": {"depth": 4},
}

# Image sizes to try: the smallest on which a network runs will do.
SIDES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 331, 336, 384)

WIDTHS: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 80,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "use_cache": False, "embedding_size": 40, "q_lora_rank": None,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80,
    "dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, "ffn_dim": 80,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def tokens(length: int = 9) -> Tensor:
    return torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(1))


def text(model: nn.Module) -> Inputs:
    """An encoder, or a decoder alone."""
    return (), {"input_ids": tokens()}


def text_pair(model: nn.Module) -> Inputs:
    """An encoder and a decoder."""
    return (), {"input_ids": tokens(), "decoder_input_ids": tokens(6)}


def image(model: nn.Module) -> Inputs:
    side = model.config.image_size
    side = side if isinstance(side, int) else side[0]
    return (), {"pixel_values": torch.randn(2, 3, side, side)}


def picture(model: nn.Module) -> Inputs:
    """Any size will do."""
    return (), {"pixel_values": torch.randn(2, 3, 64, 64)}


def speech(model: nn.Module) -> Inputs:
    return (), {"input_values": torch.randn(2, 1600)}


def spectrum(model: nn.Module) -> Inputs:
    return (), {
        "input_features": torch.randn(2, model.config.num_mel_bins, 48),
        "decoder_input_ids": tokens(6),
    }


def masked_image(model: nn.Module) -> Inputs:
    """The noise that decides which patches are hidden is an input, too."""
    inputs, named = image(model)
    return inputs, named | {"noise": torch.rand(2, (32 // 8) ** 2)}


def image_and_text(model: nn.Module) -> Inputs:
    return (), {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}


# Model type: the head, its inputs, and what differs from WIDTHS.
HUGGING_FACE: dict[str, tuple[str, Callable[[nn.Module], Inputs], dict[str, Any]]] = {
    "albert": ("AutoModel", text, {}),
    "bert": ("AutoModelForMaskedLM", text, {}),
    "camembert": ("AutoModel", text, {}),
    "deberta": ("AutoModel", text, {}),
    "deberta-v2": ("AutoModel", text, {}),
    "distilbert": ("AutoModelForMaskedLM", text, {}),
    "electra": ("AutoModel", text, {}),
    "ernie": ("AutoModel", text, {}),
    "mobilebert": ("AutoModel", text, {"embedding_size": 48, "intra_bottleneck_size": 32}),
    "modernbert": ("AutoModel", text, {}),
    "mpnet": ("AutoModel", text, {}),
    "roberta": ("AutoModelForSequenceClassification", text, {}),
    "squeezebert": ("AutoModel", text, {"embedding_size": 48}),
    "xlnet": ("AutoModel", text, {"d_inner": 80, "n_head": 4, "n_layer": 2}),
    "xlm-roberta": ("AutoModel", text, {}),
    "bloom": ("AutoModelForCausalLM", text, {}),
    "cohere": ("AutoModelForCausalLM", text, {}),
    "falcon": ("AutoModelForCausalLM", text, {}),
    "gemma": ("AutoModelForCausalLM", text, {}),
    "gemma2": ("AutoModelForCausalLM", text, {}),
    "gemma3_text": ("AutoModelForCausalLM", text, {}),
    "gpt2": ("AutoModelForCausalLM", text, {}),
    "gpt_bigcode": ("AutoModelForCausalLM", text, {"multi_query": True}),
    "gpt_neo": ("AutoModelForCausalLM", text, {"attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": ("AutoModelForCausalLM", text, {}),
    "gptj": ("AutoModelForCausalLM", text, {"rotary_dim": 4}),
    "granite": ("AutoModelForCausalLM", text, {}),
    "llama": ("AutoModelForCausalLM", text, {}),
    "mamba": ("AutoModelForCausalLM", text, {}),
    "mistral": ("AutoModelForCausalLM", text, {}),
    "mixtral": ("AutoModelForCausalLM", text, {}),
    "mpt": ("AutoModelForCausalLM", text, {}),
    "olmo": ("AutoModelForCausalLM", text, {}),
    "olmo2": ("AutoModelForCausalLM", text, {}),
    "opt": ("AutoModelForCausalLM", text, {"word_embed_proj_dim": 48}),
    "phi": ("AutoModelForCausalLM", text, {}),
    "phi3": ("AutoModelForCausalLM", text, {}),
    "qwen2": ("AutoModelForCausalLM", text, {}),
    "qwen2_moe": (
        "AutoModelForCausalLM",
        text,
        {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 56},
    ),
    "qwen3": ("AutoModelForCausalLM", text, {}),
    "smollm3": ("AutoModelForCausalLM", text, {}),
    "starcoder2": ("AutoModelForCausalLM", text, {}),
    "bart": ("AutoModelForSeq2SeqLM", text_pair, {}),
    "marian": ("AutoModelForSeq2SeqLM", text_pair, {}),
    "mbart": ("AutoModelForSeq2SeqLM", text_pair, {}),
    "mt5": ("AutoModelForSeq2SeqLM", text_pair, {}),
    "pegasus": ("AutoModelForSeq2SeqLM", text_pair, {}),
    "t5": ("AutoModelForSeq2SeqLM", text_pair, {}),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        spectrum,
        {"max_source_positions": 24, "max_target_positions": 32, "num_mel_bins": 16},
    ),
    "hubert": ("AutoModel", speech, {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4}),
    "wav2vec2": ("AutoModel", speech, {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4}),
    "beit": ("AutoModel", image, {}),
    "deit": ("AutoModel", image, {}),
    "dinov2": ("AutoModel", image, {}),
    "mobilenet_v2": ("AutoModel", picture, {}),
    "resnet": ("AutoModelForImageClassification", picture, {}),
    "detr": (
        "AutoModel",
        picture,
        {"use_timm_backbone": False, "use_pretrained_backbone": False, "num_queries": 7,
         "backbone": None, "backbone_config": {
             "model_type": "resnet", "out_features": ["stage4"], "embedding_size": 16,
             "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}},
    ),
    "levit": (
        "AutoModel",
        image,
        {"image_size": 64, "patch_size": 16, "hidden_sizes": [32, 48, 64],
         "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
    ),
    "segformer": (
        "AutoModelForSemanticSegmentation", picture, {"num_attention_heads": [1, 2, 5, 8]}
    ),
    "siglip_vision_model": ("AutoModel", image, {}),
    "swin": (
        "AutoModel",
        image,
        {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [2, 2],
         "num_heads": [2, 4], "num_attention_heads": [2, 4], "num_hidden_layers": 2},
    ),
    "swinv2": (
        "AutoModel",
        image,
        {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [2, 2],
         "num_heads": [2, 4], "num_attention_heads": [2, 4], "num_hidden_layers": 2},
    ),
    "vit": ("AutoModelForImageClassification", image, {}),
    "vit_mae": ("AutoModel", masked_image, {}),
    "clip": ("AutoModel", image_and_text, {}),
}  # fmt: skip


def names_of(source: str) -> list[str]:
    """All names of a source that this machine's version of the library has."""
    if source == "torchvision":
        import torchvision

        return torchvision.models.list_models(module=torchvision.models)
    if source == "timm":
        import timm

        return [f"timm:{name}" for name in TIMM if timm.is_model(name)]
    return [f"hf:{name}" for name in HUGGING_FACE]


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A network in eval mode and inputs for it."""
    source, colon, own = name.partition(":")
    if not colon:
        source, own = "torchvision", name
    torch.manual_seed(0)
    model, inputs = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}[source](own)
    randomize(model, inputs)
    return model, inputs


def _torchvision(name: str) -> tuple[nn.Module, Inputs]:
    import torchvision

    model = torchvision.models.get_model(name, weights=None).eval()
    if name.startswith("vit"):
        side = int(model.image_size)
    elif name.startswith("inception"):
        side = 128
    else:
        # Architectures with position tables take the one size they were made for.
        side = 224 if name.startswith(("swin", "maxvit")) else 64
    return model, ((torch.randn(2, 3, side, side),), {})


def _timm(name: str) -> tuple[nn.Module, Inputs]:
    """The network at the smallest of a few image sizes that it can be built for and runs on."""
    import timm

    small = TIMM_OPTIONS.get(name, {})
    for side in SIDES:
        for options in ({"img_size": side}, {}):
            try:
                model = timm.create_model(name, pretrained=False, **small, **options).eval()
                images = torch.randn(2, 3, side, side)
                with torch.no_grad():
                    model(images)
            except (TypeError, ValueError, RuntimeError, AssertionError, IndexError):
                continue  # it does not take a size, or not this one
            return model, ((images,), {})
    raise ValueError(f"{name} runs on no image size of {SIDES}")


def _hugging_face(name: str) -> tuple[nn.Module, Inputs]:
    import transformers

    head, inputs, own = HUGGING_FACE[name]
    settings: Mapping[str, Any] = WIDTHS | own
    if name == "clip":
        parts = {key: dict(WIDTHS) for key in ("text_config", "vision_config")}
        config = transformers.AutoConfig.for_model(name, **parts, projection_dim=40)
    else:
        known = vars(type(transformers.AutoConfig.for_model(name))())
        mapped = transformers.AutoConfig.for_model(name).attribute_map
        settings = {k: v for k, v in settings.items() if k in known or k in mapped}
        config = transformers.AutoConfig.for_model(name, **settings)
    model = getattr(transformers, head).from_config(config).eval()
    made = inputs(model)
    with torch.no_grad():
        # Some install hooks at their first call, and install them twice if that is a trace.
        model(*made[0], **made[1])
    return model, made


def randomize(model: nn.Module, inputs: Inputs) -> None:
    """Numbers of their own where a fresh network has constants, and activations of ordinary size.

    With affine parameters, biases or layer scales all equal, an error in what is done with them
    would not show; where activations grow from layer to layer, float32 itself means nothing.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            first = parameter.reshape(-1)[:1]
            if not parameter.is_floating_point() or bool((parameter != first).any()):
                continue
            if abs(float(first)) < 0.1:  # a bias, or a scale that starts near zero
                parameter.normal_(0, 0.1, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)

    def settle(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Statistics of the size of what comes in; the few examples' own would amplify them."""
        (x,) = arguments
        size = x.square().mean().clamp_min(1e-6)
        shift = torch.empty_like(norm.running_mean).normal_(0, 0.1, generator=generator)  # type: ignore[arg-type]
        scale = torch.empty_like(shift).uniform_(0.5, 1.5, generator=generator)
        norm.running_mean.copy_(shift * size.sqrt())  # type: ignore[operator, union-attr]
        norm.running_var.copy_(scale * size)  # type: ignore[operator, union-attr]

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norms = [m for m in model.modules() if isinstance(m, kinds) and m.running_var is not None]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    args, kwargs = inputs
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
