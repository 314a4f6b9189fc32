"""Small random pipelines of diffusers, one for each family, and what their own `encode_prompt` makes of prompts."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers

from clip_jax import ClipTextConfig
from clip_jax.tokenizers import ClipTokenizer
from tests.checkpoints import TINY, TINY_H
from tests.tokenizers.test_t5 import CHARACTER_MAP

EOS = "<|endoftext|>"

# No two widths, and no width and its projection, are alike: what is swapped does not fit, or shows.
CLIP_L = TINY
CLIP_L_PROJECTED = dataclasses.replace(TINY, projection_dim=24)
CLIP_G = dataclasses.replace(TINY_H, num_hidden_layers=3, projection_dim=40)
T5 = {"d_model": 104, "d_kv": 8, "d_ff": 72, "num_layers": 2, "num_heads": 5, "vocab_size": 1024}


def clip_model(config: ClipTextConfig, seed: int) -> transformers.PreTrainedModel:
    """A CLIP text model as the pipelines have it: with a projection if the config has one."""
    return _scatter(new_clip_model(config), seed)


def new_clip_model(config: ClipTextConfig) -> transformers.PreTrainedModel:
    """The same with the weights of transformers' initialisation."""
    projected = config.projection_dim is not None
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    published = {"bos_token_id": 0, "eos_token_id": 2}  # so in every config.json there is, and not the true ids
    model = cls(transformers.CLIPTextConfig(**config.to_hf() | published))
    model.set_attn_implementation("eager")
    return model.eval()


def t5_model(seed: int) -> transformers.PreTrainedModel:
    """A T5 v1.1 encoder."""
    model = transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **T5))
    model.set_attn_implementation("eager")
    return _scatter(model.eval(), seed)


def _scatter(model: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    """Draws weights that are far from the initialisation, biases and norms too, and keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = (0 if name.endswith("bias") else 1) + 0.2 * values
        elif parameter.ndim == 1:
            values = 0.2 * values
        elif name == "shared.weight":
            # Hundreds of pads are alike, and so are the roundings of what attention adds of them up: with wide
            # embeddings beside it those of torch, 2e-5, are a smaller part of the sum.
            values = 3 * values
        elif "embedding" in name:
            values = 0.5 * values
        elif "relative_attention_bias" not in name:
            values = values * parameter.shape[1] ** -0.5
            if name.endswith(".q.weight"):  # T5 does not scale its scores, its initialisation does
                values = values * T5["d_kv"] ** -0.5
        parameter.data.copy_(values)
    return model


def clip_tokenizer(folder: Path, pad: str = EOS) -> transformers.CLIPTokenizer:
    """The CLIP tokenizer of the pipelines; the second of a pipeline pads with "!"."""
    ClipTokenizer.packaged(pad).save(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


@functools.cache
def t5_tokenizer() -> transformers.T5Tokenizer:
    """T5's tokenizer around a small Unigram vocabulary, trained on words of CLIP's vocabulary."""
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=800, special_tokens=special, unk_token="<unk>", show_progress=False)
    words = sorted(ClipTokenizer.packaged()._pipeline.get_vocab())[::10]
    trained.train_from_iterator([word.removesuffix("</w>") for word in words], trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"][len(special) :]
    return transformers.T5Tokenizer(
        # Each run adds the scores up in an order of its own: what is left of them here is the same in all.
        [*((token, 0.0) for token in special), *sorted((piece, round(score, 1)) for piece, score in pieces)],
        _spm_precompiled_charsmap=CHARACTER_MAP,
        model_max_length=512,
    )


# One function to build and one to encode for each family. The arguments of the latter are those of
# `TextEncoder.__call__` that the pipeline has too, and it returns the fields of `TextEmbeddings`.

Arrays = dict[str, np.ndarray]
Negative = str | list[str] | None
_NO_UNET = {"vae": None, "unet": None, "scheduler": None}


def _arrays(*, guidance: bool = False, **pairs: tuple[torch.Tensor, torch.Tensor | None]) -> Arrays:
    """Puts the negative rows of each (positive, negative) before the positive ones, as the pipelines do."""
    return {
        name: (torch.cat([negative, positive]) if guidance else positive).numpy()
        for name, (positive, negative) in pairs.items()
    }


def _build_sd(folder: Path, config: ClipTextConfig, pad: str) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        text_encoder=clip_model(config, 1),
        tokenizer=clip_tokenizer(folder / "made", pad),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **_NO_UNET,
    )


def _encode_sd(
    pipeline: diffusers.StableDiffusionPipeline,
    prompt: str | list[str],
    negative_prompt: Negative = None,
    *,
    guidance: bool = True,
    clip_skip: int | None = None,
) -> Arrays:
    # `clip_skip` looks for the inner model that transformers 5.6 has made one with the outer.
    vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    if isinstance(prompt, list) and isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt] * len(prompt)  # refused here alone
    embeds = pipeline.encode_prompt(prompt, "cpu", 1, guidance, negative_prompt=negative_prompt, clip_skip=clip_skip)
    return _arrays(guidance=guidance, prompt_embeds=embeds)


def _build_sdxl(folder: Path, *, zeros: bool = True) -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(
        text_encoder=clip_model(CLIP_L, 1),
        tokenizer=clip_tokenizer(folder / "made"),
        text_encoder_2=clip_model(CLIP_G, 2),
        tokenizer_2=clip_tokenizer(folder / "made_2", "!"),
        force_zeros_for_empty_prompt=zeros,
        **_NO_UNET,
    )


def _build_refiner(
    folder: Path, *, zeros: bool = False, clip_g: transformers.PreTrainedModel | None = None
) -> diffusers.StableDiffusionXLImg2ImgPipeline:
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=clip_model(CLIP_G, 2) if clip_g is None else clip_g,
        tokenizer_2=clip_tokenizer(folder / "made_2", "!"),
        force_zeros_for_empty_prompt=zeros,
        **_NO_UNET,
    )


def _encode_sdxl(
    pipeline: diffusers.StableDiffusionXLPipeline | diffusers.StableDiffusionXLImg2ImgPipeline,
    prompt: str | list[str],
    negative_prompt: Negative = None,
    *,
    prompt_2: str | list[str] | None = None,
    negative_prompt_2: Negative = None,
    guidance: bool = True,
    clip_skip: int | None = None,
) -> Arrays:
    cond, uncond, pooled, uncond_pooled = pipeline.encode_prompt(
        prompt,
        prompt_2,
        "cpu",
        do_classifier_free_guidance=guidance,
        negative_prompt=negative_prompt,
        negative_prompt_2=negative_prompt_2,
        clip_skip=clip_skip,
    )
    return _arrays(guidance=guidance, prompt_embeds=(cond, uncond), pooled_prompt_embeds=(pooled, uncond_pooled))


def _encode_refiner(
    pipeline: diffusers.StableDiffusionXLImg2ImgPipeline,
    prompt: str | list[str],
    negative_prompt: Negative = None,
    *,
    guidance: bool = True,
    clip_skip: int | None = None,
) -> Arrays:
    return _encode_sdxl(pipeline, prompt, negative_prompt, guidance=guidance, clip_skip=clip_skip)


def _build_sd3(folder: Path, *, t5: bool = True) -> diffusers.StableDiffusion3Pipeline:
    """Without T5, its rows are as wide as the transformer says: a small one with the joint width of the real."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=2,
        patch_size=1,
        in_channels=1,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=1,
        joint_attention_dim=4096,
        caption_projection_dim=4,
        pooled_projection_dim=64,
        out_channels=1,
        pos_embed_max_size=2,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=None,
        vae=None,
        text_encoder=clip_model(CLIP_L_PROJECTED, 1),
        tokenizer=clip_tokenizer(folder / "made"),
        text_encoder_2=clip_model(CLIP_G, 2),
        tokenizer_2=clip_tokenizer(folder / "made_2", "!"),
        text_encoder_3=t5_model(3) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def _encode_sd3(
    pipeline: diffusers.StableDiffusion3Pipeline,
    prompt: str | list[str],
    negative_prompt: Negative = None,
    *,
    prompt_2: str | list[str] | None = None,
    prompt_3: str | list[str] | None = None,
    negative_prompt_2: Negative = None,
    negative_prompt_3: Negative = None,
    guidance: bool = True,
    clip_skip: int | None = None,
    max_sequence_length: int = 256,
) -> Arrays:
    cond, uncond, pooled, uncond_pooled = pipeline.encode_prompt(
        prompt,
        prompt_2,
        prompt_3,
        "cpu",
        do_classifier_free_guidance=guidance,
        negative_prompt=negative_prompt,
        negative_prompt_2=negative_prompt_2,
        negative_prompt_3=negative_prompt_3,
        clip_skip=clip_skip,
        max_sequence_length=max_sequence_length,
    )
    return _arrays(guidance=guidance, prompt_embeds=(cond, uncond), pooled_prompt_embeds=(pooled, uncond_pooled))


def _build_flux(folder: Path) -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=clip_model(CLIP_L, 1),
        tokenizer=clip_tokenizer(folder / "made"),
        text_encoder_2=t5_model(3),
        tokenizer_2=t5_tokenizer(),
    )


def _encode_flux(
    pipeline: diffusers.FluxPipeline,
    prompt: str | list[str],
    negative_prompt: Negative = None,
    *,
    prompt_2: str | list[str] | None = None,
    negative_prompt_2: Negative = None,
    guidance: bool = False,
    max_sequence_length: int = 512,
) -> Arrays:
    def encode(first: str | list[str], second: Negative) -> tuple[torch.Tensor, ...]:
        return pipeline.encode_prompt(first, second, "cpu", max_sequence_length=max_sequence_length)

    def for_each(negative: Negative) -> Negative:
        return [negative] * len(prompt) if isinstance(prompt, list) and isinstance(negative, str) else negative

    cond, pooled, text_ids = encode(prompt, prompt_2)
    uncond = uncond_pooled = None
    if guidance:  # the pipeline makes two calls too, and runs its transformer twice
        uncond, uncond_pooled, _ = encode(for_each(negative_prompt or ""), for_each(negative_prompt_2))
    arrays = _arrays(guidance=guidance, prompt_embeds=(cond, uncond), pooled_prompt_embeds=(pooled, uncond_pooled))
    return {**arrays, "text_ids": text_ids.numpy()}


@dataclasses.dataclass(frozen=True)
class Reference:
    """How to build a small pipeline of a family in an empty folder, and how to ask it."""

    build: Callable[..., diffusers.DiffusionPipeline]
    encode: Callable[..., Arrays]

    def takes(self, arguments: dict[str, Any]) -> bool:
        """Whether the pipeline has all of these arguments."""
        return arguments.keys() <= inspect.signature(self.encode).parameters.keys()


REFERENCES = {
    "sd15": Reference(lambda folder: _build_sd(folder, CLIP_L, EOS), _encode_sd),
    "sd21": Reference(lambda folder: _build_sd(folder, TINY_H, "!"), _encode_sd),
    "sdxl": Reference(_build_sdxl, _encode_sdxl),
    "sdxl_refiner": Reference(_build_refiner, _encode_refiner),
    "sd3": Reference(_build_sd3, _encode_sd3),
    "flux": Reference(_build_flux, _encode_flux),
}


def build(name: str, folder: Path, **options: Any) -> diffusers.DiffusionPipeline:
    """A small random pipeline of the family `name`, saved to `folder / "saved"`."""
    pipeline = REFERENCES[name].build(folder, **options)
    pipeline.save_pretrained(folder / "saved")
    return pipeline


def reference(pipeline: diffusers.DiffusionPipeline, name: str, **arguments: Any) -> Arrays:
    """The fields of `TextEmbeddings` that the family `name` has, by `encode_prompt` of its pipeline."""
    with torch.no_grad():
        return REFERENCES[name].encode(pipeline, **arguments)
