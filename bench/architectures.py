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

# One of a family each: the smallest, or the one that is trained at the smallest image.
TIMM = (
    "bat_resnext26ts", "beit_base_patch16_224", "botnet26t_256", "cait_xxs24_224", "coat_tiny",
    "coatnet_nano_rw_224", "convit_tiny", "convmixer_768_32", "convnext_atto", "convnextv2_atto",
    "crossvit_9_240", "cs3darknet_s", "cspresnet50", "davit_tiny", "deit_tiny_patch16_224",
    "deit3_small_patch16_224", "densenet121", "dla34", "dpn48b", "edgenext_xx_small",
    "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0", "efficientnetv2_rw_t",
    "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_dw", "eva02_tiny_patch14_224",
    "fasternet_t0", "fastvit_t8", "fbnetc_100", "focalnet_tiny_srf", "gcresnet33ts", "gcvit_xxtiny",
    "gernet_s", "ghostnet_050", "ghostnetv2_100", "gmixer_24_224", "gmlp_ti16_224",
    "halonet26t", "hardcorenas_a", "haloregnetz_b", "hgnet_tiny", "hgnetv2_b0", "hiera_tiny_224",
    "hieradet_small", "hrnet_w18_small", "inception_next_atto", "inception_v3", "inception_v4",
    "lambda_resnet26t", "lcnet_035", "legacy_senet154", "levit_128s", "mambaout_femto",
    "maxvit_tiny_rw_224", "maxxvit_rmlp_nano_rw_256", "mixer_s32_224",
    "mixnet_s", "mnasnet_050", "mobilenetv2_035", "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035", "mobileone_s0", "mobilevit_xxs", "mobilevitv2_050",
    "mvitv2_tiny", "nasnetalarge", "nest_tiny", "nextvit_small", "nf_regnet_b0", "nf_resnet26",
    "pit_ti_224", "pnasnet5large", "poolformer_s12", "pvt_v2_b0", "rdnet_tiny", "regnetx_002",
    "regnety_002", "regnetv_040", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_14w_8s",
    "resmlp_12_224", "resnest14d", "resnet18", "resnetrs50", "resnetv2_18", "resnext26ts",
    "rexnet_100", "rexnetr_100", "samvit_base_patch16_224", "sebotnet33ts_256", "seresnet18",
    "selecsls42", "semnasnet_050", "sequencer2d_s", "shvit_s1", "skresnet18",
    "spnasnet_100", "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "tf_efficientnet_lite0", "tiny_vit_5m_224",
    "tinynet_e", "tnt_s_patch16_224", "tresnet_m", "twins_pcpvt_small", "twins_svt_small",
    "vgg11", "visformer_tiny", "vit_tiny_patch16_224", "vitamin_small_224", "volo_d1_224",
    "wide_resnet50_2", "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip

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
    "xlm-roberta": ("AutoModel", text, {}),
    "bloom": ("AutoModelForCausalLM", text, {}),
    "cohere": ("AutoModelForCausalLM", text, {}),
    "falcon": ("AutoModelForCausalLM", text, {}),
    "gemma": ("AutoModelForCausalLM", text, {}),
    "gemma2": ("AutoModelForCausalLM", text, {}),
    "gemma3_text": ("AutoModelForCausalLM", text, {}),
    "gpt2": ("AutoModelForCausalLM", text, {}),
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
    "vit": ("AutoModelForImageClassification", image, {}),
    "vit_mae": ("AutoModel", image, {}),
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
    import timm

    model = timm.create_model(name, pretrained=False).eval()
    size = model.default_cfg["input_size"]
    return model, ((torch.randn(2, *size),), {})


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
    return model, inputs(model)


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
                parameter.uniform_(0.2, 0.8, generator=generator)

    def settle(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Statistics near those of what comes in."""
        (x,) = arguments
        x = x.transpose(0, 1).flatten(1)
        mean, variance = x.mean(1), x.var(1, correction=0).clamp_min(0.1)
        shift = torch.empty_like(mean).normal_(0, 0.1, generator=generator)
        scale = torch.empty_like(mean).uniform_(0.5, 1.5, generator=generator)
        norm.running_mean.copy_(mean + shift * variance.sqrt())  # type: ignore[operator, union-attr]
        norm.running_var.copy_(variance * scale)  # type: ignore[operator, union-attr]

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norms = [m for m in model.modules() if isinstance(m, kinds) and m.running_var is not None]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    args, kwargs = inputs
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
