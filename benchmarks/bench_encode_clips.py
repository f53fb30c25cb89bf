"""`fastlatent encode --teacher` end to end against its stages alone: seconds per clip, video files to a finished cache.

"decode" reads, decodes and crops every clip with the threads that the end-to-end run has, and does nothing else;
"teacher" runs as many batches; "write" hashes and commits as many finished rows. On the CPU all threads use all cores,
and the floor is the serial bound, their sum; on CUDA it is the slower one of decode and teacher. The rival is what is
written by hand: a DataLoader with worker processes (PyAV, every frame decoded, torch's bilinear resize without
antialiasing), the same teacher, one torch.save for each clip.

`bytes` of a row: the video's, of "fastlatent" the cache's, per clip.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command itself sets it, before torch

import harness
import numpy as np
import torch
import torch.nn.functional as F
from bench_encode import whole_unit
from bench_video_decode import VIDEOS, decode_all, make_video
from rows import Case, Row

from fastlatent.config import EncodeConfig
from fastlatent.encoders.videomae import PUBLISHED, VideoMAE, VideoMAESizes
from fastlatent.store.rows import Rows
from fastlatent.store.writer import DatasetWriter
from fastlatent.workflows.encode import encode
from fastlatent.workflows.encode_clips import ClipSetup, set_up_clips

PROVIDERS = ("fastlatent", "decode", "teacher", "write", "dataloader")
CUDA = torch.cuda.is_available()
# One with little work, so that decoding counts, and B; both at 16 frames of 224².
TEACHERS = {"tiny": VideoMAESizes(96, 2, 3, 384), "base": PUBLISHED["base"]}


def _case(teacher: str, video: str, clips: int, dtype: str) -> Case:
    sizes: dict[str, int | float | str] = {"teacher": teacher, "video": video, "clips": clips, "frames": 16}
    return Case("encode_clips", sizes, dtype, "cuda" if CUDA else "cpu", PROVIDERS, threads=2)


CASES = (
    [_case("base", video, 2048, "bfloat16") for video in VIDEOS]
    if CUDA
    else [_case("tiny", "vp9-427x240", 128, "float32"), _case("tiny", "h264-848x480", 64, "float32")]
)


@contextmanager
def prepare(case: Case) -> Iterator[tuple[harness.Prepared, Path]]:
    """The providers, and the folder of the cache that "fastlatent" writes."""
    count = int(case.sizes["clips"])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = _write_videos(root / "videos", str(case.sizes["video"]), count)
        config = EncodeConfig(
            source=str(root / "videos"), teacher="videomaev2",
            teacher_weights=str(_write_teacher(root / "teacher.pth", TEACHERS[str(case.sizes["teacher"])])),
            out=str(root / "out"), device=case.device, compute_dtype=case.dtype, threads=case.threads,
            readers=case.threads if case.device == "cpu" else 16, unit_rows=32 if case.device == "cpu" else 4096,
        )  # fmt: skip
        setup = set_up_clips(config)
        unit = whole_unit(setup)

        def end_to_end() -> None:
            shutil.rmtree(root / "out", ignore_errors=True)
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                encode(config)

        def decode() -> None:
            with ThreadPoolExecutor(setup.reading[1]) as pool:
                assert all(
                    clips[0].error is None for clips in pool.map(lambda one: setup.read(unit, [one]), unit.items)
                )

        def teacher() -> None:
            batch = setup.blank(unit.bucket, setup.config.batch_size)
            for _ in range(-(-count // setup.config.batch_size)):
                tokens = setup.encode(batch).cpu()
            assert tokens.isfinite().all()

        functions: dict[str, Callable[[], None]] = {
            "fastlatent": end_to_end,
            "decode": decode,
            "teacher": teacher,
            "write": _writing(setup, root / "written"),
            "dataloader": _by_hand(setup, root),
        }
        prepared = harness.Prepared(
            {name: (lambda function=function: function) for name, function in functions.items()},
            bytes=size // count,
            rivals=("dataloader",),
            units=count,
        )
        yield prepared, root / "out"


def measure(case: Case, seconds: float) -> list[Row]:
    """The rows of a case, with the floor that is made of its stages."""
    with prepare(case) as (prepared, out):
        outcomes = harness.interleave(prepared.providers, device="cpu", min_seconds=seconds)
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) // prepared.units
    found = [
        replace(row, bytes=written) if row.provider == "fastlatent" else row
        for row in harness.rows_of(case, prepared, outcomes)
    ]
    alone = {row.provider: row.p50 for row in found if row.p50}
    if {"decode", "teacher", "write"} <= alone.keys():
        parts = alone["decode"], alone["teacher"]
        floor = max(parts) if case.device == "cuda" else sum(parts) + alone["write"]
        found = [
            replace(row, floor_seconds=floor, fraction_of_floor=floor / row.p50) if row.p50 else row for row in found
        ]
    return found


def _write_videos(folder: Path, name: str, count: int) -> int:
    """`count` videos; their bytes."""
    folder.mkdir()
    data = make_video(name)
    for i in range(count):
        (folder / f"{i:05d}.{VIDEOS[name][0]}").write_bytes(data)
    return count * len(data)


def _write_teacher(file: Path, sizes: VideoMAESizes) -> Path:
    """A checkpoint as they are published, with random weights."""
    torch.manual_seed(0)
    state = VideoMAE(sizes).state_dict()
    for name in [name for name in state if name.endswith("qkv.bias")]:
        query, _, value = state.pop(name).chunk(3)
        place = name.removesuffix("qkv.bias")
        state |= {f"{place}q_bias": query.clone(), f"{place}v_bias": value.clone()}
    state = {name: torch.randn_like(value) * 0.02 for name, value in state.items() if name != "positions"}
    config = {
        "embed_dim": sizes.dim, "depth": sizes.depth, "num_heads": sizes.heads, "mlp_ratio": sizes.mlp / sizes.dim,
        "patch_size": sizes.patch, "tubelet_size": sizes.tubelet, "num_frames": sizes.frames, "img_size": sizes.size,
    }  # fmt: skip
    torch.save({"model": state, "config": config}, file)
    return file


def _writing(setup: ClipSetup, out: Path) -> Callable[[], None]:
    """Units of finished rows, from the plan to the published generation."""

    def run() -> None:
        shutil.rmtree(out, ignore_errors=True)
        with DatasetWriter.open(
            out, setup.provenance(), setup.source.classes, unit_rows=setup.config.unit_rows, schema=setup.schema
        ) as writer:
            for unit in writer.plan(setup.entries(), examine=setup.examine):
                count = len(unit.items)
                extras = {"frame_index": np.zeros((count, 16), np.int32), "view_xxh3": np.zeros((count, 1), np.uint64)}
                rows = np.ones((count, *unit.bucket), np.float16)
                claimed = writer.claim_now(name=unit.id)
                assert claimed is not None
                writer.commit(claimed, Rows([item.key for item in unit.items], rows, extras=extras))
            writer.finish()

    return run


class _Clips(torch.utils.data.Dataset):
    """What is written by hand: 16 frames at stride 2 from the middle, the shorter side to 224, the middle of it."""

    def __init__(self, paths: list[Path], indices: np.ndarray) -> None:
        self.paths, self.indices = paths, indices

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        frames = torch.from_numpy(decode_all(self.paths[i].read_bytes(), self.indices)).permute(3, 0, 1, 2) / 255
        height, width = frames.shape[2:]
        scale = 224 / min(height, width)
        sides = round(height * scale), round(width * scale)
        frames = F.interpolate(frames.transpose(0, 1), sides, mode="bilinear").transpose(0, 1)
        top, left = (sides[0] - 224) // 2, (sides[1] - 224) // 2
        mean, std = (
            torch.tensor(values)[:, None, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        return (frames[..., top : top + 224, left : left + 224] - mean) / std


def _by_hand(setup: ClipSetup, root: Path) -> Callable[[], None]:
    paths = sorted((root / "videos").iterdir())
    clip = setup.reader.read(paths[0].read_bytes(), paths[0].name)

    def run() -> None:
        loader = torch.utils.data.DataLoader(
            _Clips(paths, clip.frame_index), batch_size=setup.config.batch_size, num_workers=setup.config.readers
        )
        shutil.rmtree(root / "by hand", ignore_errors=True)
        (root / "by hand").mkdir()
        done = 0
        for batch in loader:
            for tokens in setup.encoder.encode(batch.to(setup.device)).half().cpu():
                torch.save(tokens.clone(), root / "by hand" / f"{done}.pt")
                done += 1

    return run


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return harness.measure_all(CASES, measure, argv, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main()
