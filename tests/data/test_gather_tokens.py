"""LatentDataset.gather_tokens: only the tokens asked for, from every back end, and what cannot be read says so."""

import os

import numpy as np
import pytest
import torch

from fastlatent.data.backends import BACKENDS
from fastlatent.data.latents import LatentDataset
from fastlatent.data.masks import MaskConfig
from fastlatent.ops.read_rows import io_uring_refusal
from fastlatent.store.records import RAGGED, Schema
from fastlatent.store.rows import Rows, quantize
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter

COUNT, TOKENS, WIDTH = 23, 12, 6  # shards of 5 clips, the last one of 3
GRID = (3, 2, 2)


def values(clip, tokens=TOKENS):
    """float16 [tokens, WIDTH] of a clip."""
    return np.random.default_rng(clip).standard_normal((tokens, WIDTH)).astype(np.float16)


def write(folder, rows, buckets=((1, TOKENS, WIDTH),), payload="tokens", bucket_of=lambda i: 0):
    (folder / "source").mkdir(parents=True)
    entries = []
    for i in range(COUNT):
        path = folder / "source" / f"{i:04d}"
        path.write_text(str(i))
        stat = path.stat()
        entries.append(Entry(path.name, str(path), -1, stat.st_size, stat.st_mtime_ns, bucket=bucket_of(i)))
    provenance = {"hashed": {"teacher": {"weights": "0" * 64}}, "informational": {}}
    with DatasetWriter.open(folder / "d", provenance, [], unit_rows=5, schema=Schema(buckets, payload)) as writer:
        for unit in writer.plan(entries):
            keys = [item.key for item in unit.items]
            payload_rows, scale = rows([int(key) for key in keys], unit.bucket)
            writer.commit(unit, Rows(keys, payload_rows, scale=scale))
        writer.finish()
    return folder / "d"


def as_float16(clips, bucket):
    return np.stack([values(clip)[None] for clip in clips]), None


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokens"), as_float16)


def usable(backend):
    if backend == "io_uring" and (refusal := io_uring_refusal()):
        pytest.skip(f"io_uring: {refusal}")
    return backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["F16", "BF16", "I8"])
def test_every_backend_gives_what_gather_gives(tmp_path, backend, kind):
    def rows(clips, bucket):
        stored, scale = as_float16(clips, bucket)
        if kind == "I8":
            return quantize(stored, 3)
        return (stored.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) if kind == "BF16" else stored, scale

    dataset = LatentDataset(write(tmp_path, rows), backend=usable(backend))
    indices = np.array([22, 0, 4, 5, 5, 3])  # both sides of a shard's edge, the last clip, one clip twice
    # Runs, single tokens, the first and the last one, some not rising, one twice.
    wanted = torch.tensor([[0, 1, 2, 3], [0, 5, 7, 11], [8, 9, 10, 11], [0, 1, 6, 7], [3, 2, 1, 1], [11, 0, 11, 0]])
    found = dataset.gather_tokens(indices, wanted)
    whole = dataset.gather(indices)
    assert found.keys() == ({"tokens", "scale"} if kind == "I8" else {"tokens"})
    for name, part in found.items():
        assert part.dtype == whole[name].dtype
        for i, row in enumerate(wanted):
            assert torch.equal(part[i], whole[name][i, 0, row])
    again = dataset.gather_tokens(indices[::-1].copy(), wanted.flip(0).numpy(), out=found, threads=2)
    assert all(again[name] is found[name] for name in found)
    assert torch.equal(again["tokens"][5], whole["tokens"][0, 0, wanted[0]])


def test_masked_and_visible_are_the_whole(tokens):
    dataset = LatentDataset(tokens, columns=("label",))  # the payload need not be among the columns
    config, indices = MaskConfig("random", 0.75), np.arange(COUNT)
    hashes = dataset.store.key_hash
    masked, visible = config.masked(0, 1, hashes, GRID), config.visible(0, 1, hashes, GRID)
    back = torch.empty(COUNT, TOKENS, WIDTH, dtype=torch.float16)
    for part in (masked, visible):
        found = dataset.gather_tokens(indices, part)["tokens"]
        back.scatter_(1, part[..., None].expand_as(found), found)
    want = np.stack([values(int(dataset.store.key(i))) for i in range(COUNT)])
    np.testing.assert_array_equal(back.numpy(), want)


def test_one_scale_for_a_whole_clip(tmp_path):
    dataset = LatentDataset(write(tmp_path, lambda clips, bucket: quantize(as_float16(clips, bucket)[0], 2)))
    indices = np.array([7, 1])
    found = dataset.gather_tokens(indices, np.array([[0, 11], [4, 5]]))
    whole = dataset.gather(indices)
    assert whole["scale"].shape == (2, 1) and torch.equal(found["scale"], whole["scale"].expand(2, 2))


def test_clips_of_several_lengths(tmp_path):
    """Buckets: fixed lengths of 12 and 6, and a ragged one of 1 + clip % 4, all int8."""

    def rows(clips, bucket):
        parts = [quantize(values(clip, 1 + clip % 4 if RAGGED in bucket else bucket[1]), 1) for clip in clips]
        stored, scale = [one[0] for one in parts], [one[1] for one in parts]
        return (stored, scale) if RAGGED in bucket else (np.stack(stored)[:, None], np.stack(scale)[:, None])

    buckets = (1, TOKENS, WIDTH), (1, 6, WIDTH), (1, RAGGED, WIDTH)
    dataset = LatentDataset(write(tmp_path, rows, buckets, bucket_of=lambda i: i % 3))  # clip i is sample i
    for clips, lengths, wanted in (
        ([0, 3, 21], [12, 12, 12], [[11, 0], [5, 6], [2, 3]]),
        ([22, 1, 4], [6, 6, 6], [[5, 0], [1, 2], [3, 3]]),
        ([8, 11, 5], [1, 4, 2], [[0, 0], [3, 1], [0, 1]]),
    ):
        found = dataset.gather_tokens(np.array(clips), np.array(wanted))
        for i, (clip, length) in enumerate(zip(clips, lengths, strict=True)):
            stored, scale = quantize(values(clip, length), 1)
            np.testing.assert_array_equal(found["tokens"][i].numpy(), stored[wanted[i]])
            np.testing.assert_array_equal(found["scale"][i].numpy(), scale[wanted[i]])
    with pytest.raises(ValueError, match="gather_tokens: expected samples of one bucket, got some of"):
        dataset.gather_tokens(np.arange(3), np.zeros((3, 1), np.int64))
    with pytest.raises(ValueError, match=r"sample 8 \('0008'\): expected tokens from 0 to 0, got 1: was the mask"):
        dataset.gather_tokens(np.array([11, 8]), np.array([[0, 1], [0, 1]]))


@pytest.mark.parametrize(("token", "clip"), [(12, 3), (-1, 22)])
def test_tokens_that_are_not_there(tokens, token, clip):
    wanted = np.zeros((2, 3), np.int64)
    wanted[1, 2] = token
    message = rf"sample {clip} \('{clip:04d}'\): expected tokens from 0 to 11, got {token}: was the mask made for"
    with pytest.raises(ValueError, match=message):
        LatentDataset(tokens).gather_tokens(np.array([0, clip]), wanted)


def test_what_cannot_be_gathered(tokens, path, tmp_path):
    dataset, wanted = LatentDataset(tokens), np.zeros((2, 3), np.int64)
    for index in (-1, 23):
        with pytest.raises(ValueError, match=f"expected samples from 0 to 22, got {min(0, index)} to {max(0, index)}"):
            dataset.gather_tokens(np.array([0, index]), wanted)
    with pytest.raises(ValueError, match="expected tokens of 1 samples, got of 2"):
        dataset.gather_tokens(np.array([0]), wanted)
    with pytest.raises(ValueError, match=r"got int64 \[2\] and float64 \[2, 3\]"):
        dataset.gather_tokens(np.arange(2), wanted.astype(np.float64))
    out = dataset.gather_tokens(np.arange(2), wanted)
    with pytest.raises(ValueError, match="expected out contiguous"):
        dataset.gather_tokens(np.arange(2), wanted[:, :2], out=out)
    assert dataset.gather_tokens(np.arange(0), wanted[:0])["tokens"].shape == (0, 3, WIDTH)
    assert dataset.gather_tokens(np.arange(2), wanted[:, :0])["tokens"].shape == (2, 0, WIDTH)
    with pytest.raises(ValueError, match="expected a dataset of tokens, got moments"):
        LatentDataset(path).gather_tokens(np.arange(2), wanted)
    mirrored = write(tmp_path, lambda c, b: (np.repeat(as_float16(c, b)[0], 2, 1), None), ((2, TOKENS, WIDTH),))
    with pytest.raises(ValueError, match=r"expected rows \[1, N, D\], got \[2, 12, 6\]"):
        LatentDataset(mirrored).gather_tokens(np.arange(2), wanted)


@pytest.mark.parametrize("backend", ["willneed", "pread", "io_uring"])
def test_a_file_that_was_cut_is_named(tmp_path, backend):
    dataset = LatentDataset(write(tmp_path, as_float16), backend=usable(backend))
    indices = np.array([4, 0])
    dataset.gather_tokens(indices, np.zeros((2, 1), np.int64))
    shard = dataset.store.open_shard(int(dataset.store.shard[4]))
    os.truncate(shard.path, shard.header_bytes)
    with pytest.raises(ValueError, match=r"expected it inside the file, got the file's end"):
        dataset.gather_tokens(indices, np.full((2, 2), 11))


def test_nothing_else_is_read(tmp_path):
    """The last token of a shard is gone: the others of its clip are read, the whole clip is not."""
    dataset = LatentDataset(write(tmp_path, as_float16), backend="pread")
    shard = dataset.store.open_shard(int(dataset.store.shard[4]))
    os.truncate(shard.path, shard.bytes - 2 * WIDTH)
    assert dataset.store.row[4] == 4  # the last one
    found = dataset.gather_tokens(np.array([4]), np.arange(11)[None])["tokens"][0]
    np.testing.assert_array_equal(found.numpy(), values(4)[:11])
    for read in (lambda: dataset.gather(np.array([4])), lambda: dataset.gather_tokens(np.array([4]), np.array([[11]]))):
        with pytest.raises(ValueError, match="got the file's end"):
            read()
