"""What a JAX diffusion pipeline does with this package: load once, encode, hand the tensors on.

Runs as it is, with random weights of the full size: `python examples/diffusion_conditioning.py`. With a checkpoint:
`python examples/diffusion_conditioning.py stabilityai/stable-diffusion-xl-base-1.0`.
"""

import sys
import warnings

import jax
import jax.numpy as jnp

import clip_jax


def main() -> None:
    warnings.simplefilter("ignore", UserWarning)  # random weights say so
    source = sys.argv[1] if len(sys.argv) > 1 else "random:sd15"
    encoder = clip_jax.load(source, dtype="bfloat16")
    prompts = ["a cat sitting on a windowsill", "two dogs in the rain, 35mm"]

    out = encoder(prompts, negative_prompt="blurry, low quality")
    print("prompt_embeds", out.prompt_embeds.shape, out.prompt_embeds.dtype)
    if out.pooled_prompt_embeds is not None:
        print("pooled_prompt_embeds", out.pooled_prompt_embeds.shape)

    # Inside a jitted step of one's own, with the params as an argument: one program with what is around it.
    @jax.jit
    def conditioning_norm(params: dict, tokens: clip_jax.Tokens) -> jax.Array:
        embeds = clip_jax.text_embeddings(params, tokens, family=encoder.family).cond.prompt_embeds
        return jnp.linalg.norm(embeds.astype(jnp.float32), axis=(1, 2))

    print("norms", conditioning_norm(encoder.params, encoder.tokenize(prompts)))


if __name__ == "__main__":
    main()
