"""The main job on real data, through the commands that a user types: digits in, latents, a trained model, digits out.

Writes everything under demo/ and prints, as its last line, one JSON object with what was measured.
"""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
MARKER = DEMO / ".made-by-make-demo"
HELD_OUT = 360  # of 1,797
PER_CLASS = 10

SIZE, LATENT_CHANNELS, DOWNSAMPLE = 8, 2, 2
# Wider autoencoders learn the training images by heart: 32,64 channels reach 42 dB on them and 24 dB on held-out ones.
COMMANDS = {
    "train_vae": f"train vae digits/train --out vae --size {SIZE} --channels 1 --latent-channels {LATENT_CHANNELS} "
    "--block-out-channels 16,32 --layers-per-block 1 --norm-groups 8 --steps 1200 --batch-size 64 "
    "--learning-rate 2e-3 --ema-decay 0.995 --kl-weight 1e-4 --l1-weight 0 --checkpoint-every 600",
    "encode": f"encode digits/train --vae vae --out latents/train --size {SIZE}",
    "train_ar": "train ar latents/train --out ar --hidden-size 128 --depth 4 --num-heads 4 --mlp-ratio 4 "
    "--diffusion-depth 2 --batch-mul 2 --steps 1200 --batch-size 64 --learning-rate 2e-3 --ema-decay 0.995 "
    "--checkpoint-every 600",
    "sample": f"sample ar --output samples.safetensors --no-decode --per-class {PER_CLASS} --cfg-scale 1.25",
    "decode": f"decode samples.safetensors --output-dir samples --columns {PER_CLASS}",
}
# The held-out images through the autoencoder; part of no stage above.
ROUND_TRIP = [
    f"encode digits/test --vae vae --out latents/test --size {SIZE}",
    "decode latents/test --output-dir reconstructions --columns 20",
]


def main() -> None:
    start = time.monotonic()
    if DEMO.exists() and not MARKER.exists():
        sys.exit(f"{DEMO} was not made by `make demo`; move it away")
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    MARKER.touch()
    train, test = write_digits()
    seconds = {f"seconds_{stage}": run(command) for stage, command in COMMANDS.items()}
    for command in ROUND_TRIP:
        run(command)
    shutil.copy(DEMO / "ar" / "loss.png", DEMO / "loss.png")
    results = measure(train, test) | seconds
    results["seconds_total"] = round(time.monotonic() - start, 1)
    # Linux counts ru_maxrss in KiB; the largest of all commands.
    results["peak_rss_mib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1)
    print("\nwhat was made:")
    for name, what in {
        "demo/samples/sheet.png": f"{PER_CLASS} samples of each class, one class a row",
        "demo/reconstructions.png": "held-out images (odd rows) and their reconstructions (even rows)",
        "demo/loss.png": "training loss of the Transformer",
    }.items():
        print(f"  {name:<28} {what}")
    print("\nwhat was measured:")
    for name, value in results.items():
        print(f"  {name:<28} {value}")
    print(json.dumps(results))


def write_digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """scikit-learn's 1,797 handwritten digits (8×8, 17 grey levels) as PNG files in class folders."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    parts = {"test": np.sort(order[:HELD_OUT]), "train": np.sort(order[HELD_OUT:])}
    for name, members in parts.items():
        for i in members:
            folder = DEMO / "digits" / name / str(digits.target[i])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(folder / f"{i:04d}.png")
    print(f"{len(images)} images in {DEMO / 'digits'}: {len(parts['train'])} to train on, {HELD_OUT} held out")
    train, test = ({"images": images[parts[k]], "labels": digits.target[parts[k]]} for k in ("train", "test"))
    return train, test


def run(command: str) -> float:
    """Run one fastlatent command in demo/, printed as it is; returns its seconds."""
    print(f"\n$ fastlatent {command}", flush=True)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "fastlatent", *shlex.split(command)], cwd=DEMO)
    if done.returncode:
        sys.exit(done.returncode)
    return round(time.monotonic() - start, 1)


def measure(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> dict[str, float]:
    reconstructed, keys = read_images("reconstructions")
    original = np.stack([np.asarray(Image.open(DEMO / "digits" / "test" / key)) for key in keys])
    error = np.square((original / 255.0) - (reconstructed / 255.0)).mean()
    write_pairs(original, reconstructed)
    return measure_samples("samples", train, test) | {
        "recon_psnr_db": round(float(-10 * np.log10(error)), 2),
        "latent_numbers_per_image": LATENT_CHANNELS * (SIZE // DOWNSAMPLE) ** 2,
        "image_numbers": SIZE**2,
    }


def measure_samples(folder: str, train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> dict[str, float]:
    """Whether the images of a folder are digits of their classes, as varied as real ones, and new."""
    samples, labels = read_images(folder)
    classifier = SVC(gamma="scale").fit(flat(train["images"]), train["labels"])
    # A sample is memorised if it is nearer to a training image than every held-out image is.
    closest_held_out = nearest(flat(test["images"]), flat(train["images"])).min()
    memorised = nearest(flat(samples), flat(train["images"])) < closest_held_out
    return {
        "class_accuracy": round(float((classifier.predict(flat(samples)).astype(str) == labels).mean()), 4),
        "classifier_heldout_accuracy": round(float(classifier.score(flat(test["images"]), test["labels"])), 4),
        "spread_ratio": round(spread(samples, labels) / spread(test["images"], test["labels"].astype(str)), 4),
        "memorised_share": round(float(memorised.mean()), 4),
    }


def read_images(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Decoded images of a folder, and their names."""
    lines = [json.loads(line) for line in (DEMO / folder / "images.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(DEMO / folder / line["file"])) for line in lines])
    return images, np.array([line["name"] for line in lines])


def flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def nearest(points: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Distance of each point to the nearest of the others."""
    return np.sqrt(np.square(points[:, None] - among[None]).sum(-1)).min(1)


def spread(images: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of two images of a class, averaged over classes."""
    means = []
    for label in np.unique(labels):
        x = flat(images[labels == label])
        distances = np.sqrt(np.square(x[:, None] - x[None]).sum(-1))
        means.append(distances.sum() / (len(x) * (len(x) - 1)))
    return float(np.mean(means))


def write_pairs(
    original: np.ndarray, reconstructed: np.ndarray, columns: int = 20, rows: int = 5, zoom: int = 6
) -> None:
    """Rows of held-out images, each above its reconstructions."""
    lines = []
    for i in range(rows):
        part = slice(i * columns, (i + 1) * columns)
        lines += [np.concatenate(list(images[part]), axis=1) for images in (original, reconstructed)]
    sheet = np.concatenate(lines).repeat(zoom, 0).repeat(zoom, 1)
    Image.fromarray(sheet).save(DEMO / "reconstructions.png")


if __name__ == "__main__":
    main()
