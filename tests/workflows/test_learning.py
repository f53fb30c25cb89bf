"""Models of latents learn what no shortcut gives, by the commands that a user types: the demo's digits."""

import importlib.util
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlatent.cli import main

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo.py"
# Sizes and steps of the demo's Transformer; tokens of 2×2 take a third of the time of its 1×1.
DIT = (
    "train dit latents/train --hidden-size 128 --depth 4 --num-heads 4 --mlp-ratio 4 --patch-size 2 --steps 1200 "
    "--batch-size 64 --learning-rate 2e-3 --ema-decay 0.995 --checkpoint-every 600"
)
PER_CLASS = 30  # 300 samples: the standard deviation of an accuracy of 0.98 is 0.008


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """tools/demo.py in a folder with its autoencoder and latents, its images to train on, and those held out."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    demo.DEMO = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(demo.DEMO)
        parts = demo.write_digits()
        run(demo.COMMANDS["train_vae"])
        run(demo.COMMANDS["encode"])
        yield demo, *parts


def run(line):
    assert main([*shlex.split(line), "--device", "cpu"]) == 0, line


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["dit v_prediction", "dit flow", "ar"])
def test_samples_are_digits_of_their_class(digits, kind):
    demo, train, test = digits
    name = kind.replace(" ", "-")
    if kind == "ar":
        run(demo.COMMANDS["train_ar"])
    else:
        run(f"{DIT} --out {name} --prediction-type {kind.split()[1]}")
    for scale in (1.25, 1.0):
        folder = f"{name}-{scale}"
        run(f"sample {name} --output {folder} --per-class {PER_CLASS} --cfg-scale {scale}")
        result = demo.measure_samples(folder, train, test)
        print(f"{kind}, guidance {scale}: {result}")
        # Real held-out digits: 0.99 and 1. One image per class would have a spread of 0.
        assert result["class_accuracy"] >= 0.97
        assert result["spread_ratio"] >= 0.7


@pytest.mark.soak
def test_latent_ddpm_uses_as_much_ink_as_its_condition_says(digits):
    """The condition is the mean grey of a digit, of 9 in 10; the VAE and the latents hide it among 32 numbers."""
    demo, train, _ = digits
    records = [{"record_type": "set", "output_root": str(demo.DEMO / "digits/train")}]
    for i, file in enumerate(sorted((demo.DEMO / "digits/train").rglob("*.png"))):
        metadata = {"ink": ink(np.asarray(Image.open(file)))} if i % 10 else {}
        relative = file.relative_to(demo.DEMO / "digits/train")
        records.append({"record_type": "sample", "output_rel": str(relative), "metadata": metadata})
    Path("manifest.json").write_text("\n".join(map(json.dumps, records)))
    run(f"encode manifest.json --vae vae --out latents/ink --size {demo.SIZE} --condition-spec ink:1")
    run(
        "train ddpm latents/ink --out ddpm --block-out-channels 32,64 --norm-groups 8 --layers-per-block 1 "
        "--steps 1000 --batch-size 64 --learning-rate 2e-3 --warmup-steps 50 --ema-decay 0.99 --beta-schedule cosine "
        "--prediction-type v_prediction"
    )
    low, high = np.quantile(ink(train["images"]), [0.05, 0.95])
    wanted = np.linspace(low, high, 100)
    Path("cond.json").write_text(json.dumps([{"ink": value} for value in wanted]))

    def correlation(more, folder):
        run(f"sample ddpm --output {folder} {more}")
        return np.corrcoef(ink(demo.read_images(folder)[0]), wanted)[0, 1]

    given = correlation("--cond cond.json --cfg-scale 1.5", "given")
    without = correlation("--num 100 --cfg-scale 1", "without")
    print(f"correlation of ink with the condition: {given:.3f}; without: {without:.3f}")
    assert given >= 0.9
    assert abs(without) < 0.3  # 100 unrelated numbers: 0.2 is two standard deviations


def ink(images):
    return images.mean((-2, -1)) / 255
