"""NextTokenPipeline: what `fastlatent sample` and `decode` give, in memory."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastlatent
from fastlatent.workflows.latent_files import read_latent_file


@pytest.fixture(scope="module")
def pipeline(chain):
    return fastlatent.NextTokenPipeline.from_pretrained(chain.ar, threads=1)


def test_images_are_those_of_the_command(chain, pipeline, tmp_path):
    assert chain.sample(chain.ar, tmp_path / "out", "--labels 1,0 --cfg-scale 2 --seed 5").code == 0
    images = pipeline([1, 0], num_inference_steps=2, guidance_scale=2, seed=5)
    for i, image in enumerate(images):
        assert np.array_equal(image, Image.open(tmp_path / "out" / "images" / f"{i:06d}.png"))


def test_latents_are_raw(chain, pipeline, tmp_path):
    assert chain.sample(chain.ar, tmp_path / "l.safetensors", "--no-decode").code == 0
    latents = pipeline(torch.tensor([0, 1]), num_inference_steps=2, output_type="latent")
    assert torch.equal(latents, read_latent_file(tmp_path / "l.safetensors").raw())
    normalised = load_file(tmp_path / "l.safetensors")["latents"].transpose(1, 2).reshape(latents.shape)
    assert not torch.allclose(latents, normalised)


def test_a_label_alone_and_none(pipeline):
    assert len(pipeline(1, num_inference_steps=1)) == 1
    assert pipeline([], num_inference_steps=1) == []
    assert pipeline([], num_inference_steps=1, output_type="latent").shape == (0, 2, 4, 4)


def test_the_sampler_is_kept_while_settings_are_the_same(pipeline):
    pipeline(0, num_inference_steps=1)
    sampler = pipeline._sampler[1]
    pipeline(1, num_inference_steps=1, seed=3)
    assert pipeline._sampler[1] is sampler
    pipeline(1, num_inference_steps=2)
    assert pipeline._sampler[1] is not sampler


def test_batches_change_no_noise(chain, pipeline):
    small = fastlatent.NextTokenPipeline.from_pretrained(chain.ar, threads=1, decode=False, batch_size=1)
    want = pipeline([0, 1, 1], num_inference_steps=2, output_type="latent")
    got = small([0, 1, 1], num_inference_steps=2, output_type="latent")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 2}, "labels: expected 0 to 1"),
        ({"labels": 0, "output_type": "np"}, "output_type: expected pil or latent, got 'np'"),
        ({"labels": 0, "num_inference_steps": 0}, "num_inference_steps: expected at least 1, got 0"),
        ({"labels": 0, "num_inference_steps": 1001}, "expected 1 to 1000 steps, got 1001"),
        ({"labels": 0, "guidance_scale": float("nan")}, "cfg_scale: expected a finite number"),
        ({"labels": 0, "seed": -1}, "seed: expected at least 0"),
    ],
)
def test_bad_calls(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_bad_loads(chain, tmp_path):
    with pytest.raises(ValueError, match="unknown key 'stepz'"):
        fastlatent.NextTokenPipeline.from_pretrained(chain.ar, stepz=3)
    with pytest.raises(ValueError, match="nothing-there"):
        fastlatent.NextTokenPipeline.from_pretrained(tmp_path / "nothing-there")
    bare = fastlatent.NextTokenPipeline.from_pretrained(chain.ar, threads=1, decode=False)
    with pytest.raises(ValueError, match="no autoencoder"):
        bare(0)
