"""Datasets of every kind of row through LatentDataset and LatentLoader: buckets, int8, further tensors, groups."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastlatent.data.latents import LatentDataset, draw_latents
from fastlatent.data.loader import LatentLoader
from fastlatent.store.records import RAGGED, Field, Schema
from fastlatent.store.rows import Rows, quantize
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter

PROVENANCE = {"hashed": {"vae": {"weights": "0" * 64}}, "informational": {"vae_path": "none"}}


def write(folder, count, schema, rows, *, unit_rows=5, place=lambda i: {}):
    """Sample i has the key i; `rows(numbers, bucket)` are those of a unit."""
    (folder / "source").mkdir(parents=True)
    entries = []
    for i in range(count):
        path = folder / "source" / f"{i:04d}"
        path.write_text(str(i))
        stat = path.stat()
        entries.append(Entry(path.name, str(path), -1, stat.st_size, stat.st_mtime_ns, **place(i)))
    with DatasetWriter.open(folder / "d", PROVENANCE, [], unit_rows=unit_rows, schema=schema) as writer:
        for unit in writer.plan(entries):
            keys = [item.key for item in unit.items]
            payload, more = rows([int(key) for key in keys], unit.bucket)
            writer.commit(unit, Rows(keys, payload, **more))
        writer.finish()
    return folder / "d"


def numbers_of(dataset, batch):
    """Which sample each row of a batch is, by its key's hash."""
    place = {int(value): i for i, value in enumerate(dataset.store.key_hash.view(np.int64).tolist())}
    return [int(dataset.store.key(place[int(value)])) for value in batch["key_hash"]]


def normal(numbers, shape):
    return np.stack([np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i in numbers])


BUCKETS = ((1, 4, 2, 3), (1, 4, 3, 2), (1, 4, 2, 2))


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    """40 rows in three shapes: 14, 13 and 13."""

    def rows(numbers, bucket):
        return normal(numbers, bucket).astype(np.float16), {}

    folder = tmp_path_factory.mktemp("bucketed")
    return write(folder, 40, Schema(BUCKETS), rows, place=lambda i: {"bucket": i % 3})


def batches(path, steps, **arguments):
    dataset = LatentDataset(path)
    loader = LatentLoader(dataset, 4, seed=3, **arguments)
    found = []
    for step in range(steps):
        batch = loader.batch(step)
        found.append((batch["epoch"], numbers_of(dataset, batch), batch["moments"]))
    loader.close()
    return found


@pytest.mark.parametrize("backend", ["ram", "willneed", "pread"])
def test_every_batch_has_one_shape(bucketed, backend):
    dataset = LatentDataset(bucketed)
    loader = LatentLoader(dataset, 4, seed=3, backend=backend)
    assert len(loader) == 3 + 3 + 3  # of 14, 13 and 13
    seen, shapes = [], set()
    for batch in loader:
        numbers = numbers_of(dataset, batch)
        bucket = BUCKETS[numbers[0] % 3]
        assert batch["moments"].shape == (4, *bucket)
        np.testing.assert_array_equal(batch["moments"].numpy(), normal(numbers, bucket).astype(np.float16))
        seen += numbers
        shapes.add(bucket)
    assert len(set(seen)) == len(seen) == 36 and shapes == set(BUCKETS)


def test_buckets_in_the_same_order_whatever_happens(bucketed):
    want = batches(bucketed, 20)
    assert [one[:2] for one in batches(bucketed, 20, prefetch=0)] == [one[:2] for one in want]
    halves = [batches(bucketed, 20, rank=rank, world_size=2) for rank in (0, 1)]
    for (_, numbers, _), (_, first, _), (_, second, _) in zip(want, *halves, strict=True):
        assert numbers[0::2] == first and numbers[1::2] == second
    assert want[0][0] == 0 and want[19][0] == 2
    assert [one[1] for one in want[:9]] != [one[1] for one in want[9:18]]


def test_rows_of_several_buckets_are_no_batch(bucketed):
    dataset = LatentDataset(bucketed)
    with pytest.raises(ValueError, match="of one bucket, got some of"):
        dataset.gather(np.arange(3))
    with pytest.raises(ValueError, match="latents of one shape"):
        _ = dataset.row_shape
    # Map-style access gives each sample its own shape.
    samples = dataset.__getitems__([5, 0, 1])
    assert [tuple(sample["moments"].shape) for sample in samples] == [BUCKETS[2], BUCKETS[0], BUCKETS[1]]
    assert torch.equal(samples[1]["moments"], dataset[0]["moments"])


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    def rows(numbers, bucket):
        values, scale = quantize(normal(numbers, bucket), 3)
        return values, {"scale": scale}

    return write(tmp_path_factory.mktemp("int8"), 12, Schema(((2, 6, 2, 2),)), rows)


def test_int8_rows_come_with_their_scales(int8):
    dataset = LatentDataset(int8)
    batch = dataset.gather(np.array([7, 0, 11]), check_rows=True)
    assert batch["moments"].dtype == torch.int8 and batch["scale"].shape == (3, 2, 6)
    wide = batch["moments"] * batch["scale"][..., None, None]
    exact = torch.from_numpy(normal([7, 0, 11], (2, 6, 2, 2)))
    assert (wide - exact).abs().max() <= 0.51 * batch["scale"].max()
    drawn = draw_latents(batch["moments"], batch["key_hash"], seed=1, epoch=0, scale=batch["scale"])
    want = draw_latents(wide, batch["key_hash"], seed=1, epoch=0)
    torch.testing.assert_close(drawn, want, rtol=1e-6, atol=1e-6)


def test_a_damaged_scale_is_found(int8, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in int8.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(int8)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(int8)).write_bytes(file.read_bytes())
    dataset = LatentDataset(copy)
    shard = dataset.store.open_shard(int(dataset.store.shard[3]))
    offset = shard.columns["moments.scale"].ctypes.data - np.frombuffer(shard.mapping, np.uint8, 1).ctypes.data
    with open(shard.path, "r+b") as file:
        file.seek(offset + 4 * 12 * int(dataset.store.row[3]))
        file.write(b"\x00\x00\x80\x3f")  # 1.0
    with pytest.raises(ValueError, match=r"'0003'.*fastlatent repair"):
        LatentDataset(copy).gather(np.array([2, 3]), check_rows=True)
    with pytest.raises(ValueError, match="`scale` among the columns"):
        LatentDataset(copy, columns=("moments",)).gather(np.array([2]), check_rows=True)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Tokens [1 + i % 4, 3] of sample i, a caption of i % 3 bytes, a bfloat16 embedding and int8 none."""

    def rows(numbers, bucket):
        tokens = [normal([i], (1 + i % 4, 3))[0] for i in numbers]
        captions = [np.full(i % 3, i, np.uint8) for i in numbers]
        embeddings = (normal(numbers, (2,)).view(np.uint32) >> 16).astype(np.uint16)
        return tokens, {"extras": {"caption": captions, "embedding": embeddings}}

    extras = (Field("caption", "U8", (RAGGED,)), Field("embedding", "BF16", (2,)))
    return write(tmp_path_factory.mktemp("ragged"), 12, Schema(((1, RAGGED, 3),), "tokens", extras), rows)


def test_ragged_rows_and_further_tensors(ragged):
    dataset = LatentDataset(ragged)
    assert dataset.columns == ("tokens", "label", "key_hash", "caption", "embedding")
    order = [6, 0, 11, 3]
    batch = dataset.gather(np.array(order), check_rows=True)
    assert batch["tokens.offsets"].tolist() == [0, 3, 4, 8, 12] and batch["caption.offsets"].tolist() == [0, 0, 0, 2, 2]
    np.testing.assert_array_equal(
        batch["tokens"].numpy(), np.concatenate([normal([i], (1 + i % 4, 3))[0] for i in order])
    )
    assert batch["caption"].tolist() == [11, 11] and batch["embedding"].dtype == torch.bfloat16
    sample = dataset[11]
    assert sample["tokens"].shape == (4, 3) and sample["caption"].tolist() == [11, 11]
    assert not any(name.endswith(".offsets") for name in sample)
    loader = LatentLoader(dataset, 5, seed=0, check_rows=True)
    seen = [number for batch in loader for number in numbers_of(dataset, batch)]
    assert len(seen) == 10 and len(set(seen)) == 10
    with pytest.raises(ValueError, match="expected ram for rows that differ in length, got 'pread'"):
        LatentDataset(ragged, backend="pread").open()


def test_a_group_is_read_in_its_order(tmp_path):
    def rows(numbers, bucket):
        return normal(numbers, bucket), {}

    # Sample i is frame 11 - i of trajectory i % 3: the order in a group is not that of the keys.
    path = write(tmp_path, 12, Schema(((1, 4, 2, 2),)), rows, place=lambda i: {"group": f"t{i % 3}", "order": 11 - i})
    dataset = LatentDataset(path)
    for number in range(3):
        group = dataset.group(number)
        assert group["order"].tolist() == sorted(11 - i for i in range(number, 12, 3))
        members = [11 - place for place in group["order"].tolist()]
        assert numbers_of(dataset, group) == members
        np.testing.assert_array_equal(group["moments"].numpy(), normal(members, (1, 4, 2, 2)))
    with pytest.raises(ValueError, match="group from 0 to 2, got 3"):
        dataset.group(3)


def test_no_groups(bucketed):
    with pytest.raises(ValueError, match="expected a dataset with groups"):
        LatentDataset(Path(bucketed)).group(0)


def test_ragged_rows_beside_others(tmp_path):
    def rows(numbers, bucket):
        if bucket[1] == RAGGED:
            values = [np.full((1 + i, 4), i, np.int8) for i in numbers]
            return values, {"scale": [np.full(1 + i, 0.5, np.float32) for i in numbers]}
        values = np.stack([np.full(bucket, i, np.int8) for i in numbers])
        return values, {"scale": np.full((len(numbers), 1, 3), 0.25, np.float32)}

    schema = Schema(((1, RAGGED, 4), (1, 3, 4)), "tokens")
    path = write(tmp_path, 12, schema, rows, place=lambda i: {"bucket": i % 2})
    dataset = LatentDataset(path)
    for batch in LatentLoader(dataset, 3, check_rows=True):
        numbers = numbers_of(dataset, batch)
        wide = batch["tokens"] * batch["scale"][..., None]
        if numbers[0] % 2 == 0:
            assert batch["tokens.offsets"].tolist() == np.cumsum([0, *(1 + i for i in numbers)]).tolist()
            assert wide.tolist() == [[0.5 * i] * 4 for i in numbers for _ in range(1 + i)]
        else:
            assert "tokens.offsets" not in batch and wide[:, 0, 0, 0].tolist() == [0.25 * i for i in numbers]
    samples = dataset.__getitems__([2, 3])
    assert samples[0]["tokens"].shape == (3, 4) and samples[0]["scale"].shape == (3,)
    assert samples[1]["tokens"].shape == (1, 3, 4)
