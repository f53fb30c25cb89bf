"""An experiment folder as a video pipeline's latent storage leaves it, with random latents."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

FOLDERS = ("videos", "logs", "configs", "reports", "latents", "attention_maps")
GUIDANCE = 5.0


def settings(
    *,
    model_id: str,
    steps: int,
    fps: float,
    width: int,
    height: int,
    frames: int,
    suffix: str = ".npy.gz",
    seed: int = 0,
) -> dict[str, dict[str, object] | object]:
    """Every section of generation_config.yaml. `steps` is the scheduler's number of steps."""
    return {
        "model_settings": {
            "seed": seed,
            "sampler": "unipc",
            "cfg_scale": GUIDANCE,
            "steps": steps,
            "eta": 0.0,
            "clip_skip": 1,
            "model_id": model_id,
        },
        "memory_settings": {"use_half_precision": True, "enable_vae_slicing": False, "cpu_offload": False},
        "video_settings": {
            "width": width,
            "height": height,
            "fps": fps,
            "duration": frames / fps,
            "frames": frames,
        },
        "prompt_settings": {"template": "a [small|large] boat on the sea", "negative_prompt": ""},
        "latent_analysis_settings": {
            "store_latents": True,
            "latent_storage_format": "torch" if suffix.startswith(".pt") else "numpy",
            "storage_interval": 1,
            "compress_latents": suffix.endswith(".gz"),
            "storage_dtype": "float16",
        },
        "attention_analysis_settings": {"store_attention": False, "attention_maps": []},
        "cfg_schedule_settings": {"enabled": False, "schedule": {}},
        "prompt_weighting_settings": {"enabled": False},
        "videos_per_variation": 2,
        "output_dir": "outputs",
        "batch_name": "toy",
        "use_timestamp": True,
    }


def write_latent(path: Path, values: np.ndarray) -> None:
    """`values` as .npy, .npy.gz, .pt, .pt.gz or .safetensors, by the name's end."""
    stream = io.BytesIO()
    name = path.name.removesuffix(".gz")
    if name.endswith(".npy"):
        np.save(stream, values, allow_pickle=False)
    elif name.endswith(".pt"):
        import torch  # not at the top: who writes .npy only pays nothing for it

        torch.save(torch.from_numpy(values), stream)
    elif name.endswith(".safetensors"):
        import safetensors.numpy

        stream.write(safetensors.numpy.save({"latent": np.ascontiguousarray(values)}))
    else:
        raise ValueError(
            f"expected a name that ends in .npy, .pt or .safetensors, with or without .gz, got {path.name}"
        )
    data = stream.getvalue()
    # mtime=0: the same seed gives the same bytes.
    path.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)


def make_experiment(
    root: Path,
    *,
    model_id: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    prompts: Iterable[str] = ("prompt_000", "prompt_001"),
    videos: Iterable[str] = ("vid_000", "vid_001"),
    steps: Iterable[int] = (0, 1),
    shape: tuple[int, ...] = (1, 16, 2, 4, 6),
    suffix: str = ".npy.gz",
    seed: int = 0,
    fps: float = 16,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    total_steps: int = 20,
    extra: Mapping[str, object] | None = None,
) -> Path:
    """Write configs/, latents/PROMPT/VIDEO/step_NNN* and the empty folders under `root`; returns `root`.

    The latents are float16 normal [*shape], a function of seed and the numbers of prompt, video and step. Width, height
    and frames default to what Wan 2.1's VAE (stride 4 in time, 8 in space) makes of `shape` as [1, C, t, h, w]. The
    files are step_NNN<suffix>, step_NNN_metadata.json and summary.json. `extra` replaces whole sections of the config.
    """
    steps = tuple(steps)
    t, h, w = shape[-3:]
    config = settings(
        model_id=model_id,
        steps=total_steps,
        fps=fps,
        width=8 * w if width is None else width,
        height=8 * h if height is None else height,
        frames=4 * (t - 1) + 1 if frames is None else frames,
        suffix=suffix,
        seed=seed,
    ) | dict(extra or {})
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    import yaml

    (root / "configs" / "generation_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    for i, prompt in enumerate(prompts):
        for j, video in enumerate(videos):
            folder = root / "latents" / prompt / video
            folder.mkdir(parents=True, exist_ok=True)
            for step in steps:
                name = f"step_{step:03d}"
                values = np.random.default_rng([seed, i, j, step]).standard_normal(shape).astype(np.float16)
                write_latent(folder / (name + suffix), values)
                metadata = {
                    "video_id": video,
                    "step": step,
                    "timestep": 1000 - step * 1000 // total_steps,
                    "total_steps": total_steps,
                    "shape": list(shape),
                    "dtype": "torch.float16",
                    "prompt": f"a boat on the sea, number {i}",
                    "seed": seed + j,
                    "cfg_scale": GUIDANCE,
                    "generation_time": 0.5,
                    "sigma": 1 - step / total_steps,
                }
                (folder / f"{name}_metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")
            summary = {
                "video_id": video,
                "stored_steps": list(steps),
                "total_stored": len(steps),
                "storage_dir": str(folder),
                "storage_format": "torch" if suffix.startswith(".pt") else "numpy",
                "compressed": suffix.endswith(".gz"),
            }
            (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return root
