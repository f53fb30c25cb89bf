"""MAR's cache as training data: nothing is known of the autoencoder that made it."""

import numpy as np

from fastlatent import config
from fastlatent.config import ConvertConfig, TrainDitConfig
from fastlatent.workflows.convert import convert
from fastlatent.workflows.train_labelled import open_labelled


def test_training_is_told_of_no_autoencoder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a/0", "a/1", "b/2", "b/3"):
        (tmp_path / "cache" / name[0]).mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / f"cache/{name}.JPEG.npz", moments=rng.standard_normal((8, 4, 4)).astype("f4"))
    convert(config.build(ConvertConfig, {}, {"source": str(tmp_path / "cache"), "out": str(tmp_path / "latents")}))
    source = open_labelled(config.build(TrainDitConfig, {}, {"latents": str(tmp_path / "latents"), "out": "x"}), "dit")
    # Not {"path": None}, which no checkpoint's config.json may hold; None would be a model of pixels.
    assert source.vae == {} and source.classes == ["a", "b"] and source.count == 4
