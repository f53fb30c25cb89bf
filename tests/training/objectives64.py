"""Every objective by its own command, but in float64: data for all of them, and one run."""

import json
import sys
from pathlib import Path

import numpy as np
import toy_training as toy
from PIL import Image

import fastlatent.workflows.train as flow
from fastlatent import cli

SIDE = 32  # the smallest that a PatchGAN judges
STEPS = 6
COMMON = (
    f"--steps {STEPS} --batch-size 4 --warmup-steps 2 --learning-rate 1e-2 --ema-decay 0.9 --checkpoint-every 2 "
    "--seed 3 --device cpu"
)
SIZES = "--hidden-size 64 --depth 1 --num-heads 2 --mlp-ratio 2"
UNET = "--block-out-channels 8,8 --layers-per-block 1 --norm-groups 4 --preview-images 1 --preview-inference-steps 2"
COMMANDS = {
    "vae": f"train vae {{images}} --size {SIDE} --block-out-channels 8,8,8 --layers-per-block 1 --norm-groups 4 "
    "--latent-channels 2 --mirror --disc-weight 0.5 --disc-start 2 --kl-reduction sum",
    "ar": f"train ar {{latents}} {SIZES} --diffusion-depth 1 --batch-mul 2",
    "dit": f"train dit {{latents}} {SIZES} --prediction-type flow --flow-times logit_normal",
    "ddpm": f"train ddpm {{latents}} {UNET}",
    "pixel-ddpm": f"train pixel-ddpm {{manifest}} --size 8 --condition-spec bright:1 --unet UNet2DModel {UNET}",
}


def make_data(folder):
    """Eight grey-value images of two classes with a condition in a manifest, an autoencoder, and their latents."""
    folder = Path(folder)
    images, lines = folder / "images", [{"record_type": "set", "output_root": "images"}]
    for i in range(8):
        values = np.random.default_rng(i).integers(0, 256, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
        name = f"{'ab'[i % 2]}/{i}.png"
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.repeat(4, 0).repeat(4, 1)).save(images / name)
        metadata = {"bright": float(values.mean())} if i else {}  # the first has none
        lines.append({"record_type": "sample", "output_rel": name, "metadata": metadata})
    (folder / "manifest.json").write_text("\n".join(map(json.dumps, lines)))
    run({"vae": COMMANDS["vae"]}, "vae", str(folder), "first-vae")
    encode(folder, images, "latents")
    encode(folder, folder / "manifest.json", "with-conditions", "--condition-spec", "bright:1")


def encode(folder, source, out, *more):
    command = ["encode", source, "--vae", folder / "first-vae", "--out", folder / out, "--size", SIDE, *more]
    assert cli.main([str(word) for word in command]) == 0


def run(commands, name, folder, out, stop_at=None, more=()):
    """One command of `commands` in float64; a crash before step `stop_at`."""
    original = flow.train

    def train(objective, run, settings, team, config):
        objective.module.double()
        if stop_at is not None:
            toy.at_step(objective, stop_at, toy.crash)
        original(objective, run, settings, team, config)

    flow.train = train
    places = {
        "images": f"{folder}/images", "manifest": f"{folder}/manifest.json",
        "latents": f"{folder}/{'with-conditions' if name == 'ddpm' else 'latents'}",
    }  # fmt: skip
    line = f"{commands[name].format(**places)} {COMMON} --out {folder}/{out}"
    try:
        assert cli.main([*line.split(), *more]) == 0
    except toy.CrashError:
        sys.exit(0)
    finally:
        flow.train = original


def run_one(name, folder, out, stop_at=None, more=()):
    run(COMMANDS, name, folder, out, stop_at, more)
