import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from fastlatent.encoders.diffusers_autoencoders import WEIGHTS
from fastlatent.encoders.load import load_autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, latent_channels=2,
        sample_size=8, scaling_factor=0.3,
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "vae")


def edit_config(path, **values):
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


def edit_weights(path, change):
    save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS)


def test_encode_and_decode_are_those_of_diffusers(folder):
    # Weights that require gradients take another attention kernel, also where none are recorded: other last bits.
    vae, plain = load_autoencoder(folder), AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
    assert (vae.pixel_channels, vae.latent_channels, vae.downsample) == (3, 2, 2)
    pixels = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = plain.encode(pixels).latent_dist
        moments = vae.encode(pixels)
        assert moments.shape == (2, 4, 4, 5)
        # Unscaled: no scaling_factor.
        assert torch.equal(moments, torch.cat([posterior.mean, posterior.logvar], 1))
        assert torch.equal(vae.decode(posterior.mean), plain.decode(posterior.mean).sample)
    assert not moments.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(folder, dtype):
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    full, half = load_autoencoder(folder), load_autoencoder(folder, "cpu", dtype)
    got = half.encode(pixels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, full.encode(pixels), rtol=0.1, atol=0.1)
    assert not torch.equal(got, full.encode(pixels))
    assert half.decode(got[:, :2]).dtype == torch.float32
    # The dtype it runs in is not part of what it is.
    assert half.identity() == full.identity()


def test_identity_holds_the_config_and_is_json(folder):
    identity = load_autoencoder(folder).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["class"] == "AutoencoderKL"
    assert identity["config"]["latent_channels"] == 2
    assert len(identity["weights"]) == 64


def test_identity_stays_where_no_byte_of_the_output_changes(folder, copied, tmp_path):
    want = load_autoencoder(folder).identity()
    assert load_autoencoder(copied).identity() == want
    # Saved by diffusers again, and the scaling that we do not apply.
    AutoencoderKL.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert load_autoencoder(tmp_path / "again").identity() == want
    edit_config(copied, scaling_factor=1.7, shift_factor=0.5, _name_or_path="x", _diffusers_version="0.1")
    assert load_autoencoder(copied).identity() == want


def test_identity_changes_with_one_bit(folder, copied):
    def flip(state):
        flat = state["encoder.conv_in.weight"].view(torch.int32).view(-1)
        flat[17] ^= 1
        return state

    want = load_autoencoder(folder).identity()
    edit_weights(copied, flip)
    got = load_autoencoder(copied).identity()
    assert got["weights"] != want["weights"]
    assert got["config"] == want["config"]


def test_identity_changes_with_the_config(folder, copied):
    edit_config(copied, act_fn="relu")
    assert load_autoencoder(copied).identity() != load_autoencoder(folder).identity()


def test_identity_is_the_same_in_every_process(copied):
    # Published configs lack entries that were added later; diffusers lists them in the order of a set.
    late = ("shift_factor", "latents_mean", "latents_std", "mid_block_add_attention", "use_quant_conv",
            "use_post_quant_conv", "force_upcast", "scaling_factor")  # fmt: skip
    edit_config(copied, **dict.fromkeys(late, "remove"))
    code = (
        "import json, sys; from fastlatent.encoders.load import load_autoencoder; "
        "print(json.dumps(load_autoencoder(sys.argv[1]).identity()))"
    )
    here = json.dumps(load_autoencoder(copied).identity())
    # The order of a set of strings is the process's own: of eight they agree by chance once in 40,320 times.
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", code, str(copied)],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed},
    )  # fmt: skip
    assert done.stdout.strip().splitlines()[-1] == here


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: edit_weights(path, lambda s: {k: s[k] for k in s if k != "quant_conv.bias"}), "missing_keys"),
        (lambda path: edit_weights(path, lambda s: s | {"more": torch.zeros(1)}), "unexpected_keys"),
        (lambda path: edit_weights(path, lambda s: s | {"quant_conv.bias": torch.zeros(9)}), "quant_conv.bias"),
        (lambda path: edit_config(path, latent_channels=3), "does not"),
        (lambda path: edit_config(path, block_out_channels=[8, 8, 8]), "does not"),
        (lambda path: edit_config(path, norm_num_groups=3), "does not load"),
        (lambda path: edit_config(path, _class_name="UNet2DModel"), "got _class_name 'UNet2DModel'.*AutoencoderDC"),
        (lambda path: edit_config(path, in_channels=5), "does not"),
        (lambda path: edit_config(path, _class_name="remove"), "got _class_name None"),
        (lambda path: (path / "config.json").write_text("[]"), "got _class_name None"),
        (lambda path: (path / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda path: (path / "config.json").write_bytes(b"\xff\x80"), "config.json is not JSON"),
        (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1]), "does not load"),
        (lambda path: (path / WEIGHTS).write_bytes(b""), "does not load"),
        (lambda path: (path / WEIGHTS).unlink(), f"expected config.json and {WEIGHTS}"),
        (lambda path: (path / "config.json").unlink(), f"expected config.json and {WEIGHTS}"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit(copied, change, message):
    change(copied)
    with pytest.raises(ValueError, match=message) as caught:
        load_autoencoder(copied)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shards_are_the_same_autoencoder(folder, tmp_path):
    AutoencoderKL.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, sharded = load_autoencoder(folder), load_autoencoder(tmp_path)
    assert sharded.identity() == whole.identity()
    pixels = torch.ones(1, 3, 8, 8)
    assert torch.equal(sharded.encode(pixels), whole.encode(pixels))
    next(iter(tmp_path.glob("*-00001-*"))).unlink()
    with pytest.raises(ValueError, match="does not load"):
        load_autoencoder(tmp_path)


def test_sides_must_fit(folder):
    with pytest.raises(ValueError, match="multiples of 2, got 8×9"):
        load_autoencoder(folder).encode(torch.zeros(1, 3, 8, 9))


def test_upcast_is_what_float32_gives(folder, copied):
    half = load_autoencoder(copied, "cpu", torch.float16)
    full = half.upcast()
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    # Of the stored weights: rounding them to half first and casting back would differ.
    assert torch.equal(full.encode(pixels), load_autoencoder(folder).encode(pixels))
    assert half.model.dtype == torch.float16
    edit_weights(copied, lambda s: {k: v + 1 for k, v in s.items()})
    with pytest.raises(ValueError, match="changed"):
        half.upcast()


def test_a_run_gives_its_newest_checkpoint(folder, tmp_path):
    for step, shift in ((5, 0.0), (50, 1.0)):
        shutil.copytree(folder, tmp_path / f"checkpoint-{step:06d}")
        edit_weights(tmp_path / f"checkpoint-{step:06d}", lambda s, shift=shift: {k: v + shift for k, v in s.items()})
    newest = load_autoencoder(tmp_path / "checkpoint-000050").identity()
    assert load_autoencoder(tmp_path).identity() == newest
    assert load_autoencoder(folder).identity() != newest
