"""Tiny runs of both objectives, built anew for every call as a new process would."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastlatent.data.images import ImageLoader
from fastlatent.data.latents import LatentDataset
from fastlatent.data.loader import LatentLoader
from fastlatent.models.checkpoint import CheckpointConfig
from fastlatent.models.transformer import Transformer
from fastlatent.sources.image_folder import scan_image_folder
from fastlatent.training.autoregressive import NextTokenLoss, NextTokenObjective
from fastlatent.training.loop import LoopSettings

spec = importlib.util.spec_from_file_location("data_conftest", Path(__file__).parents[1] / "data" / "conftest.py")
assert spec is not None and spec.loader is not None
data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(data)

SETTINGS = {
    "steps": 9, "learning_rate": 1e-2, "warmup_steps": 3, "weight_decay": 0.1, "grad_clip": 1.0, "ema_decay": 0.9,
    "mixed_precision": "no", "checkpoint_every": 4, "keep_checkpoints": 2, "seed": 5,
}  # fmt: skip


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    return data.write(tmp_path_factory.mktemp("latents"), 11, flips=2, unit_rows=4)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def config(**change) -> CheckpointConfig:
    sizes = {
        "hidden_size": 64, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_ratio": 2.0, "diffusion_depth": 1,
        "in_channels": 2, "input_size": 3, "num_classes": 3, "prediction_type": "v_prediction",
        "latents_mean": [0.5, -0.25], "latents_std": [2.0, 0.5],
    }  # fmt: skip
    return CheckpointConfig(**{**sizes, **change})


@pytest.fixture(scope="session")
def settings():
    return lambda **change: LoopSettings(**{**SETTINGS, **change})


@pytest.fixture(scope="session")
def make_ar(latents):
    def make(**options) -> NextTokenObjective:
        options = {"prediction_type": "v_prediction", "batch_mul": 2, "class_dropout_prob": 0.3} | options
        torch.manual_seed(0)
        chosen = config(prediction_type=options["prediction_type"])
        model = Transformer(chosen)
        model.initialize()
        loss = NextTokenLoss(model, beta_schedule="cosine", **options)
        loader = LatentLoader(LatentDataset(latents), 4, seed=5)
        return NextTokenObjective(loader, loss, chosen, 5, torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def make_vae(images):
    def make():
        from diffusers import AutoencoderKL

        from fastlatent.training.vae import ReconstructionLoss, VaeObjective

        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, latent_channels=2,
            sample_size=8,
        )  # fmt: skip
        loss = ReconstructionLoss(model, mse_weight=1.0, l1_weight=0.5, kl_weight=0.25)
        items = scan_image_folder(images).items
        loader = ImageLoader(items, 3, size=8, channels=3, mirror=True, seed=5)
        return VaeObjective(loader, loss, torch.device("cpu"))

    return make


@pytest.fixture(params=["ar", "vae"])
def make(request):
    return request.getfixturevalue(f"make_{request.param}")


@pytest.fixture(scope="session")
def make_config():
    return config
