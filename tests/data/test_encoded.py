import numpy as np
import pytest
import torch
from PIL import Image

from fastlatent.data.encoded import ENCODED_TOGETHER, EncodedLoader
from fastlatent.data.images import ImageLoader
from fastlatent.sources.open import open_source


def fold(pixels):
    """[B, 1, 4, 4] → [B, 4, 2, 2]: squares of 2 × 2 pixels."""
    return torch.nn.functional.pixel_unshuffle(pixels, 2)


@pytest.mark.parametrize(("has_posterior", "name"), [(True, "moments"), (False, "latents")])
def test_gives_what_a_latent_loader_gives(tmp_path, has_posterior, name):
    for i in range(5):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i}.png")

    def encode(pixels):
        assert not torch.is_grad_enabled()
        return fold(pixels).double()

    def images():
        return ImageLoader(open_source(tmp_path), 2, size=4, channels=1, mirror=False, seed=1)

    loader = EncodedLoader(images(), encode, has_posterior)
    assert loader.steps_per_epoch == 2
    for step in range(3):
        batch, plain = loader.batch(step), images().batch(step)
        assert set(batch) == {name, "label", "key_hash", "epoch"}
        assert batch[name].dtype == torch.float32
        assert torch.equal(batch[name], fold(plain["pixels"])[:, None])
        assert torch.equal(batch["key_hash"], plain["key_hash"])
        assert batch["epoch"] == plain["epoch"]


def test_few_images_are_encoded_at_a_time(tmp_path):
    count = 2 * ENCODED_TOGETHER + 1  # two full parts, and one of a single image
    for i in range(count):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_text("no picture")
    images = ImageLoader(open_source(tmp_path), count + 1, size=4, channels=1, mirror=False, seed=1)
    sizes = []

    def encode(pixels):
        sizes.append(len(pixels))
        return fold(pixels)

    loader = EncodedLoader(images, encode, has_posterior=False)
    assert loader.left_out == {}
    latents = loader.batch(0)["latents"]
    assert sizes == [ENCODED_TOGETHER, ENCODED_TOGETHER, 2]
    assert torch.equal(latents, fold(images.batch(0)["pixels"])[:, None])
    assert list(loader.left_out) == ["bad.png"]
