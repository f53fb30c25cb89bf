"""Latent caches of other projects, as their own writers leave them: make(format, root) of every format, and arrays."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from toy_mar_cache import make_mar

DRAW = np.random.default_rng


def bytes_of(save: Callable[[Any, Any], Any], value: Any) -> bytes:
    stream = io.BytesIO()
    save(stream, value)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    return bytes_of(np.save, array)


def pt(value: Any) -> bytes:
    return bytes_of(lambda stream, one: torch.save(one, stream), value)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def mar(root: Path) -> None:
    make_mar(root, classes=2, count=20)


def lightningdit(root: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    root.mkdir(parents=True)
    for rank in range(2):
        for shard, rows in enumerate((9, 5)):
            tensors = {name: torch.randn(rows, 4, 4, 4, generator=draw) for name in ("latents", "latents_flip")}
            tensors["labels"] = torch.randint(0, 7, (rows,), generator=draw)
            said = {"total_size": str(rows), "dtype": "torch.float32", "device": "cpu"}
            save_file(tensors, root / f"latents_rank{rank:02d}_shard{shard:03d}.safetensors", said)
    torch.save({name: torch.ones(1, 4, 1, 1) for name in ("mean", "std")}, root / "latents_stats.pt")


def fast_dit(root: Path) -> None:
    draw = DRAW(0)
    for i in range(30):
        put(root / f"imagenet256_features/{i}.npy", npy(draw.standard_normal((1, 4, 4, 4)).astype(np.float32)))
        put(root / f"imagenet256_labels/{i}.npy", npy(np.array([i % 3])))


def edm2(root: Path) -> None:
    draw = DRAW(0)
    names = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in range(30)]
    for name in names:
        put(root / name, npy(np.abs(draw.standard_normal((8, 4, 4))).astype(np.float32)))
    put(root / "dataset.json", json.dumps({"labels": [[name, i % 5] for i, name in enumerate(names)]}).encode())


def frames(root: Path) -> None:
    draw = DRAW(0)
    for name, count in {"recon/a": 12, "recon/b": 3, "scand/a": 5}.items():
        for i in range(count):
            latent = torch.from_numpy(draw.standard_normal((4, 2, 3)).astype(np.float32))
            put(root / name / f"{i}.pt", pt({"latent": latent}))
        poses = {"position": draw.normal(size=(count, 2)), "yaw": draw.normal(size=count)}
        put(root / name / "traj_data.pkl", pickle.dumps(poses, protocol=4))


def steps(root: Path) -> None:
    draw = DRAW(0)
    for video in range(4):
        for i in (0, 3, 10):
            place = root / f"latents/prompt_{video // 2:03d}/vid_{video % 2:03d}/step_{i:03d}"
            values = draw.standard_normal((1, 4, 1 + video % 2, 3, 5)).astype(np.float16)
            put(place.with_name(f"{place.name}.npy.gz"), gzip.compress(npy(values), 6, mtime=0))
            put(place.with_name(f"{place.name}_metadata.json"), json.dumps({"step": i}).encode())


def tokens(root: Path) -> None:
    draw, ids = DRAW(0), [str(7 * i) for i in range(20)]
    for i, name in enumerate(ids):
        values = torch.from_numpy(draw.standard_normal((3 + i % 3, 4)).astype(np.float32))
        put(root / f"train/{name}.pt", pt(values.bfloat16()))
    put(root / "train/metadata.json", json.dumps({"video_ids": ids, "num_videos": 20}).encode())


def kohya(root: Path) -> None:
    draw = DRAW(0)
    for i in range(20):
        h, w = ((4, 6), (6, 4))[i % 2]
        arrays: dict[str, np.ndarray] = {
            "latents": draw.standard_normal((4, h, w)).astype(np.float32),
            "original_size": np.array((640, 512)),
            "crop_ltrb": np.array((0.0, 12.0, w * 8, h * 8)),
            "latents_flipped": draw.standard_normal((4, h, w)).astype(np.float32),
        }
        if i % 3 == 0:
            arrays["alpha_mask"] = draw.standard_normal((h * 8, w * 8)).astype(np.float32)
        path = root / f"{i % 2 + 1}_cat/img {i}_{w * 8:04d}x{h * 8:04d}_sdxl.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)


def simpletuner(root: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for i in range(20):
        latent = torch.randn(4, 2 + i % 2, 3 - i % 2, generator=draw).bfloat16()
        value = {"latents": latent, "lengths": torch.tensor([i]), "lyrics": f"é {i}"}
        put(root / f"set{i % 2}/{i:04x}.pt", gzip.compress(pt(value), mtime=0))


def musubi(root: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    root.mkdir(parents=True)
    for i in range(12):
        h, w = ((4, 6), (6, 4))[i % 2]
        tensors = {f"latents_2x{h}x{w}_bfloat16": torch.randn(3, 2, h, w, generator=draw).bfloat16()}
        if i < 5:
            tensors["clip_bfloat16"] = torch.randn(5, 7, generator=draw).bfloat16()
        said = {"architecture": "wan", "width": str(8 * w), "height": str(8 * h), "format_version": "1.0.1"}
        name = f"a {i}_00000-009_{8 * w:04d}x{8 * h:04d}_wan.safetensors"
        save_file(tensors, root / name, said | {"frame_count": "9"})


def webdataset(root: Path) -> None:
    draw = DRAW(0)
    root.mkdir(parents=True)
    for shard in range(3):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as archive:
            for i in range(8):
                shape = ((4, 2, 3), (4, 3, 2))[i % 2]
                members = {
                    "latents.npy": npy(draw.standard_normal(shape).astype(np.float16)),
                    "cls": b"%d" % (i % 3),
                    "txt": f"é {i}".encode(),
                }
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{shard}{i:04d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def mds(root: Path) -> None:
    draw = DRAW(0)
    root.mkdir(parents=True)
    names, encodings, sizes = ["caption", "latents"], ["str", "ndarray:float16:4,4,4"], [None, 128]
    config = {
        "version": 2, "format": "mds", "compression": None, "hashes": [], "size_limit": 1 << 20,
        "column_names": names, "column_encodings": encodings, "column_sizes": sizes,
    }  # fmt: skip
    shards = []
    for shard in range(3):
        rows = []
        for i in range(7):
            text = f"é {i}".encode()
            latent = draw.standard_normal((4, 4, 4)).astype(np.float16).tobytes()
            rows.append(np.uint32(len(text)).tobytes() + text + latent)
        said = json.dumps(config, sort_keys=True).encode()
        offsets = np.array([0, *map(len, rows)]).cumsum().astype(np.uint32) + 4 + 4 * (len(rows) + 1) + len(said)
        data = np.uint32(len(rows)).tobytes() + offsets.astype(np.uint32).tobytes() + said + b"".join(rows)
        name = f"shard.{shard:05}.mds"
        put(root / name, data)
        raw = {"basename": name, "bytes": len(data), "hashes": {}}
        shards.append({"samples": len(rows), "raw_data": raw, "zip_data": None, **config})
    (root / "index.json").write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))


# format -> (its maker, what its files do not say)
MAKERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "mar": (mar, ()),
    "lightningdit": (lightningdit, ()),
    "fast-dit": (fast_dit, ()),
    "edm2": (edm2, ()),
    "frames": (frames, ()),
    "steps": (steps, ("--scaling-factor", "1")),
    "tokens": (tokens, ()),
    "kohya": (kohya, ()),
    "simpletuner": (simpletuner, ("--scaling-factor", "unknown")),
    "musubi": (musubi, ("--scaling-factor", "1")),
    "webdataset": (webdataset, ("--scaling-factor", "1")),
    "mds": (mds, ("--scaling-factor", "1")),
}


def arrays(root: Path) -> dict[str, Any]:
    """Every array below `root` by file and name; the bytes, text or JSON of what is none. No name with a dot first."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            _take(found, path.relative_to(root).as_posix(), path.read_bytes(), path)
    return found


def _take(found: dict[str, Any], name: str, data: bytes, path: Path) -> None:
    if name.endswith(".gz") or data[:2] == b"\x1f\x8b":
        name, data = name.removesuffix(".gz"), gzip.decompress(data)
    if name.endswith(".npy"):
        found[name] = np.load(io.BytesIO(data))
    elif name.endswith(".npz"):
        with np.load(io.BytesIO(data)) as archive:
            found |= {f"{name}:{one}": archive[one] for one in archive.files}
    elif name.endswith((".pt", ".pth")):
        loaded = torch.load(io.BytesIO(data), weights_only=True)
        for one, value in (loaded if isinstance(loaded, dict) else {"": loaded}).items():
            found[f"{name}:{one}"] = value
    elif name.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            found |= {f"{name}:{one}": file.get_tensor(one) for one in file.keys()}  # noqa: SIM118
            found[f"{name}:metadata"] = file.metadata()
    elif name.endswith(".pkl"):
        found |= {f"{name}:{one}": value for one, value in pickle.loads(data).items()}
    elif name.endswith(".json"):
        found[name] = json.loads(data)
    elif name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                _take(found, f"{name}/{member.name}", archive.extractfile(member).read(), path)
    else:
        found[name] = data


def differences(before: dict[str, Any], after: dict[str, Any], rounding: float = 0.0) -> list[str]:
    """Names that only one of two `arrays` has, or whose values differ by more than `rounding` of themselves."""
    return sorted({*before} ^ {*after}) + [
        name for name in before.keys() & after.keys() if not _same(before[name], after[name], rounding)
    ]


def _same(one: Any, other: Any, rounding: float) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype:
            return False
        one, other = (value.double().numpy() for value in (one, other))
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return type(one) is type(other) and one == other
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and np.allclose(one, other, rtol=rounding, atol=0)
