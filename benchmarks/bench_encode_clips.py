"""`fastlatent encode --teacher` end to end against its stages alone: seconds per clip, video files to a finished cache.

"decode" reads, decodes and crops every clip with the threads that the end-to-end run has, and does nothing else;
"teacher" runs as many batches. On the CPU all threads use all cores, and the floor is the serial bound, decode +
teacher; on CUDA it is the slower stage. The rival is what is written by hand: a DataLoader with worker processes (PyAV,
every frame decoded up to the last that is needed, torch's resize), the same teacher, one torch.save for each clip.

`bytes` of a row: the video's, of "fastlatent" the cache's, per clip.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import av
import harness
import numpy as np
import torch
from bench_encode import whole_unit
from bench_teacher import write_teacher
from bench_video_decode import VIDEOS, write_videos
from rows import Case, Row

from fastlatent.config import EncodeConfig
from fastlatent.workflows.encode import encode
from fastlatent.workflows.encode_clips import ClipSetup, set_up_clips

PROVIDERS = ("fastlatent", "decode", "teacher", "dataloader")
CUDA = torch.cuda.is_available()


def _case(teacher: str, video: str, clips: int, dtype: str) -> Case:
    sizes: dict[str, int | float | str] = {"teacher": teacher, "video": video, "clips": clips, "frames": 16}
    return Case("encode_clips", sizes, dtype, "cuda" if CUDA else "cpu", PROVIDERS, threads=2)


CASES = (
    [_case("base", video, 2048, "bfloat16") for video in VIDEOS]
    if CUDA
    else [_case("tiny", video, clips, "float32") for video, clips in zip(VIDEOS, (96, 48), strict=False)]
)
