"""Labels → images in Python: `fastlatent sample` without its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastlatent.config import SampleConfig, build
from fastlatent.diffusion.noise import normal
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.media.images import to_uint8
from fastlatent.models.checkpoint import CheckpointConfig
from fastlatent.models.transformer import Transformer
from fastlatent.sampling.autoregressive import NextTokenSampler
from fastlatent.workflows.decode_images import load_matching_autoencoder
from fastlatent.workflows.image_files import decode_batch
from fastlatent.workflows.latent_files import LatentFile
from fastlatent.workflows.runtime import set_up
from fastlatent.workflows.sample_models import load_model, make_sampler


class NextTokenPipeline:
    """A next-token-diffusion checkpoint with its autoencoder.

    pipeline = NextTokenPipeline.from_pretrained("runs/ar", dtype="bfloat16")
    images = pipeline([3, 1, 4], guidance_scale=3.0)
    """

    def __init__(
        self, config: SampleConfig, model: Transformer, checkpoint: CheckpointConfig, vae: Autoencoder | None
    ) -> None:
        self.config, self.model, self.checkpoint, self.vae = config, model, checkpoint, vae
        self._sampler: tuple[SampleConfig, NextTokenSampler] | None = None

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **settings: Any) -> NextTokenPipeline:
        """Load a checkpoint; `settings` are the other fields of config.SampleConfig (dtype, device, vae, solver, …).

        With decode=False no autoencoder is loaded, and calls give latents only.

        Raises:
            ValueError: a setting is unknown or wrong, or checkpoint or autoencoder cannot be used.
        """
        given = {"checkpoint": os.fspath(path), "output": "-", **settings}
        config: SampleConfig = build(SampleConfig, {}, given)
        device = set_up(config.device, config.threads)
        model, checkpoint = load_model(config, device)
        vae = None
        if config.decode:
            vae = load_matching_autoencoder(
                config.vae, checkpoint.vae, checkpoint.in_channels, device, torch.float32,
                allow_other=config.allow_other_vae,
            )  # fmt: skip
        return cls(config, model, checkpoint, vae)

    def __call__(
        self,
        labels: int | Sequence[int] | Tensor,
        *,
        num_inference_steps: int = SampleConfig.num_inference_steps,
        guidance_scale: float = SampleConfig.cfg_scale,
        seed: int = SampleConfig.seed,
        output_type: str = "pil",
    ) -> list[Image.Image] | Tensor:
        """One image per label.

        Args:
            labels: classes from 0.
            num_inference_steps: denoising steps per token.
            guidance_scale: classifier-free guidance; 1 turns it off.
            seed: of the noise; sample i has the same noise in any call.
            output_type: "pil", or "latent" for raw latents float32 [B, C, side, side], what the autoencoder decodes.

        Raises:
            ValueError: a label or setting is out of range, or images are asked of a pipeline without autoencoder.
        """
        if output_type not in ("pil", "latent"):
            raise ValueError(f"output_type: expected pil or latent, got {output_type!r}")
        if output_type == "pil" and self.vae is None:
            raise ValueError('output_type pil: this pipeline has no autoencoder (decode=False); ask for "latent"')
        config = build(
            SampleConfig, {},
            vars(self.config) | {"num_inference_steps": num_inference_steps, "cfg_scale": guidance_scale, "seed": seed},
        )  # fmt: skip
        wanted = torch.as_tensor(labels, dtype=torch.int64).reshape(-1)
        grid = (self.checkpoint.num_tokens, self.checkpoint.in_channels)
        noise = normal(config.seed, range(len(wanted)), 0, grid) if len(wanted) else torch.zeros(0, *grid)
        sampler = self._sampler_for(replace(config, seed=0))
        latents = torch.cat(
            [
                sampler.sample(
                    wanted[i : i + config.batch_size], noise[i : i + config.batch_size], seed=seed, first_id=i
                )
                for i in range(0, max(1, len(wanted)), config.batch_size)
            ]
        )
        c = self.checkpoint
        raw = LatentFile(latents.cpu(), wanted, c.latents_mean, c.latents_std, c.vae, c.classes).raw()
        if output_type == "latent":
            return raw
        assert self.vae is not None
        images: list[Image.Image] = []
        for part in raw.split(config.batch_size) if len(raw) else ():
            pixels = to_uint8(decode_batch(self.vae, part).numpy())
            images += [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels]
        return images

    def _sampler_for(self, config: SampleConfig) -> NextTokenSampler:
        """The sampler of the last call, with its buffers and graphs, while the settings are the same."""
        if self._sampler is None or self._sampler[0] != config:
            self._sampler = None
            self._sampler = config, make_sampler(config, self.model, self.checkpoint)
        return self._sampler[1]
