"""Every video autoencoder from pixels to pixels: encode, normalise, store as its pipeline does, decode; as directly."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_video_models import TINY, TINY_LATENTS, VARIANTS, make_vae
from toy_experiment import make_experiment, write_latent

from fastlatent.encoders.video_autoencoders import load_video_autoencoder
from fastlatent.encoders.video_kinds import VIDEO_KINDS
from fastlatent.workflows.decode_experiment import ExperimentLatentDecoder


@pytest.mark.parametrize("name", [*TINY, *VARIANTS])
def test_from_pixels_to_pixels(tmp_path, name):
    folder = make_vae(name, tmp_path / "model" / "vae")
    vae = load_video_autoencoder(folder, "cpu", torch.float32)
    t, h, w = TINY_LATENTS[VARIANTS[name][0] if name in VARIANTS else name]
    size = vae.frames(t), h * vae.downsample, w * vae.downsample
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = vae.encode(pixels)[:, : vae.latent_channels]
    held = vae.normalize(raw)
    kind = VIDEO_KINDS[VARIANTS[name][0] if name in VARIANTS else name]
    if kind.time_first:
        held = held.transpose(1, 2)
    if kind.packed:
        held = held.flatten(2).transpose(1, 2)

    sizes = dict(zip(("frames", "height", "width"), size, strict=True))
    root = make_experiment(
        tmp_path / "e", model_id=str(tmp_path / "model"), prompts=["p"], videos=["v"], steps=[0], **sizes
    )
    path = root / "latents" / "p" / "v" / "step_000.npy.gz"
    write_latent(path, held.contiguous().numpy())
    with ExperimentLatentDecoder(root, device="cpu", format="png-frames", threads=1) as decoder:
        [result] = decoder.decode_video_directory("latents/p/v")
    assert result.success, result.error_message
    got = np.stack([np.asarray(Image.open(file)) for file in sorted(result.output_path.iterdir())])
    direct = ((vae.decode(raw)[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 3, 0).numpy()
    assert got.shape == direct.shape
    # Normalising and back rounds float32 five times: at most a few values cross the middle between two levels.
    assert np.abs(got - direct).max() <= 1 and (got != direct).mean() < 0.01
