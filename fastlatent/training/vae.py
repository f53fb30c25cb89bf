"""AutoencoderKL from scratch: squared and absolute error of the reconstruction, and the KL divergence."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from fastlatent.data.images import ImageLoader
from fastlatent.media.images import to_uint8
from fastlatent.media.sheets import save_sheet

PREVIEW_IMAGES = 8


class ReconstructionLoss(nn.Module):
    """Encoder, posterior sample, decoder and loss in one forward.

    Every term is a mean: squared and absolute error per pixel value, KL per latent value. LDM sums both instead: its
    KL weight of 1e-6 is 1e-6·(C·h·w)/(channels·H·W) here, 2.1e-8 for 256² RGB and 4×32×32 latents.
    """

    def __init__(self, model: AutoencoderKL, *, mse_weight: float, l1_weight: float, kl_weight: float) -> None:
        super().__init__()
        self.model = model
        self.mse_weight, self.l1_weight, self.kl_weight = mse_weight, l1_weight, kl_weight

    def forward(self, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """pixels [B, channels, H, W] in [−1, 1]. Returns (loss, {mse, l1, kl})."""
        posterior = self.model.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        error = self.model.decode(mean + (0.5 * logvar).exp() * noise).sample.float() - pixels
        mse, l1 = error.square().mean(), error.abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = self.mse_weight * mse + self.l1_weight * l1 + self.kl_weight * kl
        return loss, {"mse": mse.detach(), "l1": l1.detach(), "kl": kl.detach()}


class VaeObjective:
    """Trains an AutoencoderKL on image files; checkpoints are diffusers folders."""

    def __init__(self, loader: ImageLoader, loss: ReconstructionLoss, device: torch.device) -> None:
        self.loader, self.module, self.device = loader, loss, device

    def batch(self, step: int) -> Tensor:
        return self.loader.batch(step).to(self.device)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the diffusers folder and preview.png: images of step 0 above their reconstructions."""
        model = AutoencoderKL.from_config(self.module.model.config)
        model.load_state_dict({name.removeprefix("model."): tensor.cpu() for name, tensor in weights.items()})
        model.save_pretrained(folder)
        pixels = self.loader.batch(0)[:PREVIEW_IMAGES]
        with torch.inference_mode():
            again = model.eval()(pixels).sample
        # Weights of a run that is about to diverge give NaN; the next step's loss tells, and must be reached.
        rows = torch.cat([pixels, again]).nan_to_num().numpy()
        save_sheet(folder / "preview.png", to_uint8(rows), columns=len(pixels))
