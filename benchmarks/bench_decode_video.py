"""`fastlatent decode` of an experiment end to end against its stages alone: seconds per denoising step.

fastlatent         the command: loads the autoencoder, plans, reads, decodes and writes mp4s and records
fastlatent-loaded  `ExperimentLatentDecoder.decode_experiment` with the autoencoder loaded already
read               reads, unzips and measures (mean, NaN …) every step, and does nothing else
vae                decodes every step on the device, chunk by chunk, and drops the pixels
mp4                writes the frames of every step, which are in memory, with libx264

On the CPU all threads may use all cores, so the floor is the serial bound, read + vae + mp4; on CUDA it is "vae".
Latents are float16 noise in .npy.gz, weights are random: frames are noise, which costs libx264 more than a film.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
import torch
import yaml
from diffusers import AutoencoderKLWan
from rows import Case, Row, cpu_cores

from fastlatent.config import DecodeConfig
from fastlatent.data.step_latents import read_step, statistics
from fastlatent.media.videos import open_video
from fastlatent.workflows.decode_experiment import ExperimentLatentDecoder, decode_experiment
from fastlatent.workflows.decode_steps import to_frames

WANS: dict[str, dict[str, int]] = {"wan-2.1": {}, "narrow": {"base_dim": 8, "num_res_blocks": 1}}
PROVIDERS = ("fastlatent", "fastlatent-loaded", "read", "vae", "mp4")
STAGES = ("read", "vae", "mp4")
CUDA = torch.cuda.is_available()


def _case(vae: str, frames: int, size: str, steps: int, dtype: str) -> Case:
    sizes: dict[str, int | float | str] = {"vae": vae, "frames": frames, "size": size, "steps": steps}
    return Case("decode_video", sizes, dtype, "cuda" if CUDA else "cpu", PROVIDERS, threads=cpu_cores())


CASES = (
    [_case("wan-2.1", 61, "848x480", 8, dtype) for dtype in ("tf32", "bfloat16")]
    if CUDA
    else [_case("narrow", 17, "128x96", 8, "float32")]
)


@contextmanager
def prepare(case: Case) -> Iterator[harness.Prepared]:
    count = int(case.sizes["steps"])
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "experiment", Path(folder) / "out"
        torch.manual_seed(0)
        AutoencoderKLWan(**WANS[str(case.sizes["vae"])]).save_pretrained(Path(folder) / "vae")
        size = write_experiment(root, case)
        settings = {
            "vae": str(Path(folder) / "vae"), "output_dir": str(out), "dtype": case.dtype,
            "threads": 0 if CUDA else case.threads, "force": True,
        }  # fmt: skip
        config = DecodeConfig(latents=str(root), device=case.device, **settings)
        decoder = ExperimentLatentDecoder(root, case.device, **settings)
        steps = decoder.experiment.steps
        assert len(steps) == count
        with redirect_stdout(io.StringIO()):
            vae = decoder._load()
        videos = decoder.video_settings()

        def latents(values: torch.Tensor) -> torch.Tensor:
            return vae.denormalize(vae.arrange(values.to(decoder.device), decoder.experiment.size()))

        stored = [read_step(step.path).values for step in steps]
        # Of one step: all cost libx264 the same.
        frames = [to_frames(chunk).wait()[0].copy() for chunk in vae.stream(latents(stored[0]))]

        def end_to_end() -> None:
            shutil.rmtree(out, ignore_errors=True)
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                assert decode_experiment(config) == 0

        def loaded() -> None:
            shutil.rmtree(out, ignore_errors=True)
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                assert decoder.decode_experiment()["successful_steps"] == count

        def read() -> None:
            for step in steps:
                statistics(read_step(step.path).values)

        def decode() -> None:
            for values in stored:
                for chunk in vae.stream(latents(values)):
                    last = chunk
            assert last.flatten()[0].isfinite()  # and waits for the device

        def mp4() -> None:
            height, width, channels = frames[0].shape[1:]
            for i in range(count):
                with open_video(
                    Path(folder) / f"{i}.mp4", format="mp4", fps=videos.fps, height=height, width=width,
                    channels=channels, crf=videos.crf, scale=videos.scale,
                ) as writer:  # fmt: skip
                    for some in frames:
                        writer.write(some)

        functions: dict[str, Callable[[], None]] = {
            "fastlatent": end_to_end, "fastlatent-loaded": loaded, "read": read, "vae": decode, "mp4": mp4,
        }  # fmt: skip
        yield harness.Prepared(
            {name: (lambda function=function: function) for name, function in functions.items()},
            bytes=size // count,
            floor="vae" if CUDA else None,
            units=count,
        )
        decoder.cleanup()


def write_experiment(root: Path, case: Case) -> int:
    """One video of `steps` steps; the bytes of its latents."""
    width, height = map(int, str(case.sizes["size"]).split("x"))
    frames, size = int(case.sizes["frames"]), 0
    config = {
        "model_settings": {"model_id": "made/up"},
        "video_settings": {"width": width, "height": height, "fps": 16, "frames": frames},
    }
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "generation_config.yaml").write_text(yaml.safe_dump(config))
    folder = root / "latents" / "prompt_000" / "vid_000"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for step in range(int(case.sizes["steps"])):
        stream = io.BytesIO()
        shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        np.save(stream, draw.standard_normal(shape, dtype=np.float32).astype(np.float16))
        data = gzip.compress(stream.getvalue(), 6)
        (folder / f"step_{step:03d}.npy.gz").write_bytes(data)
        size += len(data)
    return size


def measure(case: Case, seconds: float) -> list[Row]:
    """The rows of a case, on the CPU with the floor that is made of three of its providers."""
    with prepare(case) as prepared:
        # By the wall clock on CUDA too: reading and writing are on the CPU.
        outcomes = harness.interleave(prepared.providers, device="cpu", min_seconds=seconds)
    found = harness.rows_of(case, prepared, outcomes)
    alone = [row.p50 for row in found if row.provider in STAGES and row.p50]
    if not CUDA and len(alone) == len(STAGES):
        floor = sum(alone)
        found = [
            replace(row, floor_seconds=floor, fraction_of_floor=floor / row.p50) if row.p50 else row for row in found
        ]
    return found


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return harness.measure_all(CASES, measure, argv, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main()
