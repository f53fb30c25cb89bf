"""Autoencoders from scratch: reconstruction, LPIPS, the KL divergence and an adversary, in one module's forward."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlatent.data.images import ImageLoader
from fastlatent.diffusion.noise import Draws
from fastlatent.evaluation.reconstruction import WINDOW, psnr, ssim
from fastlatent.media.images import to_uint8
from fastlatent.media.sheets import save_sheet
from fastlatent.pipeline.ahead import ahead
from fastlatent.training.discriminator import PatchDiscriminator, adaptive_weight, hinge
from fastlatent.training.lpips import LPIPS
from fastlatent.training.objective import Part
from fastlatent.training.vae_networks import LatentStatistics, Network

PREVIEW_IMAGES = 8
STATISTICS = "latent_statistics.json"
_DISCRIMINATOR = "discriminator."
LDM_KL_WEIGHT = 1e-6


@dataclass(frozen=True)
class VaeWeights:
    """Weights of the terms; squared and absolute error are means over pixel values, LPIPS over images.

    kl_reduction: "mean": the KL divergence per latent value; "sum": of a whole latent. Both are means over images.
    """

    mse: float = 0.0
    l1: float = 0.0
    lpips: float = 0.0
    kl: float = 0.0
    kl_reduction: str = "mean"
    adversarial: float = 0.0

    def ldm_unit(self, pixels: int, latent: int) -> float:
        """What a KL weight of 1 here is in latent diffusion's loss, which sums over the pixel values of an image and
        over the values of its latent."""
        return pixels / latent if self.kl_reduction == "mean" else float(pixels)


class VaeLoss(nn.Module):
    """Encoder, draw from the posterior, decoder and the whole loss.

    The batch: pixels [B, channels, H, W] in [−1, 1]; noise [B, C, h, w] and sigma [B], standard normal; adversarial:
    whether the adversary plays along. Its own loss is part of the sum, and reaches its weights alone; the
    autoencoder's part of the game reaches the autoencoder alone.
    """

    def __init__(self, network: Network, weights: VaeWeights, lpips: LPIPS | None = None) -> None:
        super().__init__()
        assert (lpips is not None) == (weights.lpips > 0)
        self.model = network.model
        self.network, self.weights = network, weights
        self.discriminator = PatchDiscriminator(network.channels) if weights.adversarial else None
        # In a list it is no part of this module: neither trained, averaged, saved, sharded nor sent to others.
        self._lpips = [lpips] if lpips is not None else []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VaeLoss:
        for lpips in self._lpips:  # moved with the rest
            lpips._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        network = self.network
        stored = next(self.model.parameters()).dtype
        pixels = batch["pixels"].to(stored)
        exact = torch.promote_types(stored, torch.float32)
        encoded = tuple(one.to(exact) for one in network.encode(pixels))
        noise, sigma = batch["noise"].to(exact), batch["sigma"].to(exact)
        again = network.decode(network.latents(encoded, noise, sigma).to(stored)).to(exact)
        # VGG16 and the discriminator cost little beside an autoencoder: they are as exact as the weights.
        with torch.autocast(pixels.device.type, enabled=False):
            loss, metrics = self._loss(again, pixels.to(exact), network.kl(encoded).flatten(1), batch["adversarial"])
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _loss(self, again: Tensor, wanted: Tensor, kl: Tensor, adversarial: bool) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.weights
        error = again - wanted
        metrics = {"mse": error.square().mean(), "l1": error.abs().mean()}
        reconstruction = weights.mse * metrics["mse"] + weights.l1 * metrics["l1"]
        for lpips in self._lpips:
            metrics["lpips"] = lpips(again, wanted).mean()
            reconstruction = reconstruction + weights.lpips * metrics["lpips"]
        metrics["kl"] = kl.mean() if weights.kl_reduction == "mean" else kl.sum(1).mean()
        loss = reconstruction + weights.kl * metrics["kl"]
        if self.discriminator is None:
            return loss, metrics
        if not adversarial:
            # The processes wait for the gradient of every weight.
            loss = loss + 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()
            zero = torch.zeros_like(loss)
            return loss, metrics | dict.fromkeys(("adversarial", "discriminator", "adaptive_weight"), zero)
        fooled = -self.discriminator.frozen(again).mean()
        # Real and made images pass one after the other: each has its own batch statistics.
        against = hinge(self.discriminator(wanted), self.discriminator(again.detach()))
        last = self.network.last.weight
        factor = weights.adversarial * adaptive_weight(reconstruction, fooled, again, last)
        loss = loss + factor * fooled + against
        return loss, metrics | {"adversarial": fooled, "discriminator": against, "adaptive_weight": factor}


class FixedImages:
    """The same images every time, to measure on: `count` of those that `loader` reads, evenly spaced."""

    def __init__(self, loader: ImageLoader, count: int, batch_size: int) -> None:
        total = len(loader.source.items)
        self.count, self.loader, self._batch_size = min(count, total), loader, batch_size
        self._numbers = np.arange(self.count) * total // self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches as the loader gives them."""
        starts = iter(range(0, self.count, self._batch_size))
        with ThreadPoolExecutor(1, thread_name_prefix="fixed images") as pool:
            for _, batch in ahead(lambda: next(starts, None), self._read, pool=pool, depth=2):
                yield batch

    def _read(self, start: int) -> dict[str, Any]:
        return self.loader.samples(self._numbers[start : start + self._batch_size])


class VaeObjective:
    """Trains an autoencoder on images; a checkpoint is a folder that `load_autoencoder` and diffusers load.

    Args:
        loader: of the training images.
        measured: training images that the statistics of the latents come from; all images are on `device`.
        validation: held-out images for PSNR and SSIM.
        shown: images of preview.png.
        disc_learning_rate, disc_start: of the adversary, and the first step with it.
    """

    # The adaptive weight takes the gradient of the last layer's weight, which a process must have whole.
    blocks: tuple[type[nn.Module], ...] = ()

    def __init__(
        self,
        loader: ImageLoader,
        loss: VaeLoss,
        *,
        measured: FixedImages,
        shown: FixedImages,
        validation: FixedImages | None,
        seed: int,
        device: torch.device,
        disc_learning_rate: float = 0.0,
        disc_start: int = 0,
    ) -> None:
        self.module: nn.Module = loss
        self.loader, self.loss, self.device, self.seed = loader, loss, device, seed
        self.measured, self.shown, self.validation = measured, shown, validation
        self.disc_start = disc_start
        self.parts: tuple[Part, ...] = ()
        if loss.discriminator is not None:
            self.parts = (Part(_DISCRIMINATOR, disc_learning_rate, disc_start),)
        self.steps_per_epoch = loader.steps_per_epoch
        self._last_measured: LatentStatistics | None = None

    def batch(self, step: int) -> dict[str, Any]:
        images = self.loader.batch(step)
        return {**self._drawn(images), "adversarial": bool(self.parts) and step >= self.disc_start}

    def _drawn(self, images: dict[str, Any]) -> dict[str, Any]:
        draws = Draws(images["key_hash"], self.seed, images["epoch"])
        return {
            "pixels": images["pixels"],
            "noise": draws.normal("posterior", self.loss.network.latent_shape),
            "sigma": draws.normal("sigma", ()),
        }

    def compile(self) -> None:
        self.loss.network.compile(adversarial=bool(self.parts))

    def left_out(self) -> Mapping[str, str]:
        return self.loader.left_out

    def save(self, folder: Path, weights: dict[str, Tensor], *, hurried: bool) -> dict[str, float]:
        """Write the autoencoder with its latents' statistics (also in latent_statistics.json, with their number),
        preview.png (images above their reconstructions), and validation.json where there are images for it; `hurried`
        the autoencoder alone, with the statistics that were measured last."""
        mine = {name.removeprefix("model."): w.float() for name, w in weights.items() if name.startswith("model.")}
        network = self.loss.network.copy(mine, self.device)
        with torch.inference_mode():
            if not hurried:
                self._last_measured = self._statistics(network)
            network.save(folder, self._last_measured)
            if self._last_measured is not None:
                values = {"count": self._last_measured.count, **self._last_measured.entries()}
                (folder / STATISTICS).write_text(json.dumps(values) + "\n", encoding="utf-8")
            if hurried:
                return {}
            self._preview(network, folder / "preview.png")
            return self._validate(network, folder / "validation.json")

    def _statistics(self, network: Network) -> LatentStatistics | None:
        channels = network.latent_shape[0]
        sums, squares = torch.zeros(2, channels, dtype=torch.float64).unbind()
        origin, count, values = torch.zeros(channels, 1, dtype=torch.float64), 0, 0
        for images in self.measured:
            batch = self._drawn(images)
            encoded = network.encode(batch["pixels"])
            # What a model of latents will see: `encode` stores moments, or the mean alone.
            latents = network.latents(encoded, batch["noise"], batch["sigma"]) if network.has_posterior else encoded[0]
            x = latents.double().cpu().transpose(0, 1).flatten(1)
            if not count:  # sums of squares around a mean far from 0 would lose digits
                origin = x.mean(1, keepdim=True)
            sums, squares = sums + (x - origin).sum(1), squares + (x - origin).square().sum(1)
            count, values = count + len(latents), values + x.shape[1]
        mean = origin[:, 0] + sums / values
        variance = (squares / values - (sums / values).square()).clamp(min=0)
        whole = mean.mean()
        std = float((variance + (mean - whole).square()).mean().sqrt())
        if not (math.isfinite(std) and std > 0 and (variance > 0).all()):
            # A run that is about to diverge: the next loss tells, and must be reached.
            print(f"standard deviations of the latents: {variance.sqrt().tolist()}, so no scaling_factor", flush=True)
            return None
        return LatentStatistics(count, float(whole), std, mean.tolist(), variance.sqrt().tolist())

    def _preview(self, network: Network, path: Path) -> None:
        pixels = torch.cat([images["pixels"] for images in self.shown])
        rows = torch.cat([pixels, self._again(network, pixels)]).nan_to_num().cpu().numpy()
        save_sheet(path, to_uint8(rows), columns=len(pixels))

    def _validate(self, network: Network, path: Path) -> dict[str, float]:
        if self.validation is None:
            return {}
        measures: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        for images in self.validation:
            pixels = images["pixels"]
            again = self._again(network, pixels)
            measures["psnr"].append(psnr(again, pixels, data_range=2.0))
            if pixels.shape[-1] >= WINDOW:  # below it SSIM is not defined
                measures["ssim"].append(ssim(again, pixels, data_range=2.0, channel_axis=1))
        found = {name: float(torch.cat(values).mean()) for name, values in measures.items() if values}
        kept = {name: value if math.isfinite(value) else None for name, value in found.items()}
        path.write_text(json.dumps({"images": self.validation.count, **kept}) + "\n", encoding="utf-8")
        return {name: value for name, value in found.items() if math.isfinite(value)}

    @staticmethod
    def _again(network: Network, pixels: Tensor) -> Tensor:
        """What becomes of images by way of the posterior's mean; floats in [−1, 1], not rounded to 8 bits."""
        return network.decode(network.encode(pixels)[0]).float().clamp(-1, 1)
