"""What rows may hold besides images' moments: buckets, groups, ragged tokens, int8, further tensors."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from fastlatent.store.derive import Conditions, merge, select
from fastlatent.store.reader import Dataset, root_digest
from fastlatent.store.records import RAGGED, Field, Quarantined, Schema
from fastlatent.store.rows import Rows, quantize
from fastlatent.store.scan import Entry
from fastlatent.store.shard import Shard
from fastlatent.store.statistics import Statistics
from fastlatent.store.verify import verify
from fastlatent.store.writer import DatasetWriter

WIDE, TALL = (1, 4, 2, 3), (1, 4, 3, 2)
BAD_SHAPES = [
    ("moments", (1, 3, 2, 2)),  # an odd number of channels is no mean||logvar
    ("moments", (3, 4, 2, 2)),  # the image and its mirror image are 2
    ("moments", (1, 4)),
    ("moments", (1, 4, 0, 2)),
    ("moments", (1, 4, 2.0, 2)),
    ("moments", (1, 4, RAGGED, 2)),
    ("moments", (1, 4, 1, 1, 1, 1)),
    ("latents", (1,)),
    ("latents", (1, RAGGED, 4)),
    ("tokens", (1, 4)),
    ("tokens", (2, RAGGED, 4)),  # mirrored rows of different lengths have no place
    ("tokens", (1, 5, RAGGED)),
    ("pixels", (1, 4, 2, 2)),
]


@pytest.mark.parametrize(("payload", "shape"), BAD_SHAPES)
def test_refuses_a_shape(payload, shape):
    with pytest.raises(ValueError, match="row shape|payload: expected one of"):
        Schema((shape,), payload)


@pytest.mark.parametrize(
    "schema",
    [
        lambda: Schema(()),
        lambda: Schema((WIDE, WIDE)),
        lambda: Schema((WIDE, (2, 4, 3, 2))),  # with and without mirror images
        lambda: Schema((WIDE, (1, 6, 3, 2))),  # other channels
        lambda: Schema((WIDE, (1, 4, 3, 2, 2))),
        lambda: Schema((WIDE,), extras=(Field("text", "U8", (RAGGED,)), Field("text", "U8", (3,)))),
        lambda: Field("moments", "F32", (3,)),
        lambda: Field("key", "F32", (3,)),
        lambda: Field("text.offsets", "U64", (3,)),
        lambda: Field("_pad.0", "U8", (3,)),
        lambda: Field("", "U8", (3,)),
        lambda: Field("text", "C64", (3,)),
        lambda: Field("text", "F32", (3, RAGGED)),
        lambda: Field("text", "F32", (0,)),
    ],
)
def test_refuses_a_schema(schema):
    with pytest.raises(ValueError, match="expected"):
        schema()


# --- a writer of anything ---


def draw_integers(generator, kind, shape):
    return generator.integers(0, 100, shape).astype(kind)


def random_rows(schema, unit, dtype="F16", per_token=False):
    """Decided by the keys alone."""
    generator = np.random.default_rng(
        int(xxhash.xxh3_64_intdigest("".join(item.key for item in unit.items).encode()) % 2**32)
    )
    count, ragged = len(unit.items), RAGGED in unit.bucket
    kinds = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16, "I8": np.int8}

    def values(shape):
        if dtype == "I8":
            return generator.integers(-127, 128, shape, np.int8)
        wide = generator.standard_normal(shape, np.float32)
        return (wide.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else wide.astype(kinds[dtype])

    lengths = generator.integers(1, 5, count).tolist()
    payload = [values((n, unit.bucket[2])) for n in lengths] if ragged else values((count, *unit.bucket))
    scale = None
    if dtype == "I8":
        shapes = [(n,) for n in lengths] if ragged else (count, *unit.bucket[: 2 if per_token else 1])
        scale = (
            [generator.random(shape, np.float32) for shape in shapes]
            if ragged
            else generator.random(shapes, np.float32)
        )
    extras = {}
    for one in schema.extras:
        kind = np.dtype({"U8": "u1", "F32": "<f4", "BF16": "<u2", "I64": "<i8"}[one.dtype])
        shapes = [(int(n), *one.shape[1:]) for n in generator.integers(0, 4, count)] if one.ragged else None
        draw = functools.partial(draw_integers, generator, kind)
        extras[one.name] = [draw(shape) for shape in shapes] if shapes is not None else draw((count, *one.shape))
    return Rows([item.key for item in unit.items], payload, scale=scale, extras=extras)


def write(toy, path, source, schema, places=lambda i: {}, unit_rows=3, keys=None, **how):
    """Bring `path` up to date; what was written, by key: (payload, scale, extras)."""
    entries, written = [], {}
    for i, key in enumerate(keys):
        if not (source / key).exists():
            toy.write_file(source, key, key.encode())
        stat = (source / key).stat()
        entries.append(Entry(key, str(source / key), -1, stat.st_size, stat.st_mtime_ns, **places(i)))
    with DatasetWriter.open(path, toy.PROVENANCE, [], unit_rows=unit_rows, schema=schema) as writer:
        for unit in writer.plan(entries):
            rows = random_rows(schema, unit, **how)
            writer.commit(unit, rows)
            for i, key in enumerate(rows.keys):
                scale = None if rows.scale is None else rows.scale[i]
                written[key] = rows.payload[i], scale, {name: some[i] for name, some in rows.extras.items()}
        writer.finish()
    return written


def stored(dataset, i, name):
    """Row i of a column, ragged or not."""
    columns, row = dataset.open_shard(int(dataset.shard[i])).columns, int(dataset.row[i])
    if f"{name}.offsets" in columns:
        return columns[name][slice(*columns[f"{name}.offsets"][row : row + 2].tolist())]
    return columns[name][row]


def check_all(path, written):
    dataset = Dataset.open(path)
    assert len(dataset) == len(written)
    for i in range(len(dataset)):
        payload, scale, extras = written[dataset.key(i)]
        np.testing.assert_array_equal(stored(dataset, i, dataset.payload), payload)
        digest = xxhash.xxh3_64(np.ascontiguousarray(payload).tobytes() + (b"" if scale is None else scale.tobytes()))
        columns = dataset.open_shard(int(dataset.shard[i])).columns
        assert columns["row_xxh3"][dataset.row[i]] == digest.intdigest()
        for name, values in extras.items():
            np.testing.assert_array_equal(stored(dataset, i, name), values)
    return dataset


KEYS = [f"{i}.jpg" for i in range(8)]
SCHEMAS = {
    "moments": Schema(((2, 4, 2, 2),)),
    "moments of sound": Schema(((1, 4, 7),)),
    "moments of video": Schema(((1, 4, 2, 2, 2),)),
    "latents": Schema(((2, 3, 2, 2),), "latents"),
    "clips": Schema(((1, 3, 2, 2, 2),), "latents"),
    "tokens": Schema(((1, 5, 6),), "tokens"),
    "ragged tokens": Schema(((1, RAGGED, 6),), "tokens"),
    "everything": Schema(
        ((1, 4, 2, 2),),
        extras=(
            Field("caption", "U8", (RAGGED,)),
            Field("embedding", "BF16", (3,)),
            Field("boxes", "F32", (RAGGED, 4)),
            Field("number", "I64", ()),
        ),
    ),
}


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "I8"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_round_trip(toy, tmp_path, name, dtype):
    schema = SCHEMAS[name]
    written = write(toy, tmp_path / "d", tmp_path / "s", schema, keys=KEYS, dtype=dtype)
    dataset = check_all(tmp_path / "d", written)
    assert (dataset.payload, tuple(dataset.extras)) == (schema.payload, schema.extras)
    assert dataset.buckets[0].dtype == dtype and dataset.buckets[0].shape == schema.buckets[0]
    # Statistics equal a two-pass computation over all values.
    rows = []
    for i in range(len(dataset)):
        payload, scale, _ = written[dataset.key(i)]
        wide = (payload.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else payload
        wide = wide.astype(np.float64)
        if scale is not None:
            wide = wide * scale.reshape(*scale.shape, *[1] * (wide.ndim - scale.ndim))
        rows.append(wide)
    if schema.payload == "tokens":
        means = np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows])
        variance = 0
    else:
        channels = rows[0].shape[1]
        flat = np.moveaxis(np.stack(rows), 2, -1).reshape(-1, channels)
        means, logvars = (
            (flat[:, : channels // 2], flat[:, channels // 2 :]) if schema.payload == "moments" else (flat, None)
        )
        variance = np.exp(np.clip(logvars, -30, 20)).mean(0) if logvars is not None else 0
    np.testing.assert_allclose(dataset.statistics.mean, means.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dataset.statistics.latent_std, np.sqrt(means.var(0) + variance), rtol=1e-12)


def test_int8_with_a_scale_for_each_token(toy, tmp_path):
    schema = Schema(((1, 5, 6),), "tokens")
    written = write(toy, tmp_path / "d", tmp_path / "s", schema, keys=KEYS, dtype="I8", per_token=True)
    dataset = check_all(tmp_path / "d", written)
    assert dataset.open_shard(0).columns["tokens.scale"].shape == (3, 1, 5)
    values = np.concatenate([row[0] * scale[0][:, None].astype(np.float64) for row, scale, _ in written.values()])
    np.testing.assert_allclose(dataset.statistics.mean, values.mean(0), rtol=1e-12)


@pytest.mark.parametrize(("count", "cost"), [(256, 0.0070), (4096, 0.0087)])
def test_what_int8_costs(count, cost):
    values = np.random.default_rng(0).standard_normal((200, 1, count)).astype(np.float32)
    for axes, shape in ((1, (200,)), (2, (200, 1))):
        rounded, scale = quantize(values, axes)
        assert scale.shape == shape and rounded.dtype == np.int8 and np.abs(rounded).max() == 127
        error = values - rounded * scale.reshape(200, 1, 1)
        assert cost * 0.95 < error.std() < cost * 1.05
    rounded, scale = quantize(np.zeros((2, 3), np.float16), 1)
    assert not rounded.any() and scale.tolist() == [1, 1]


def test_buckets(toy, tmp_path):
    schema = Schema((WIDE, TALL))
    written = write(toy, tmp_path / "d", tmp_path / "s", schema, lambda i: {"bucket": i % 2}, keys=KEYS)
    dataset = check_all(tmp_path / "d", written)
    assert [(one.shape, one.rows) for one in dataset.buckets] == [(WIDE, 4), (TALL, 4)]
    assert dataset.bucket.tolist() == [0, 1] * 4
    assert sorted(path.name for path in (tmp_path / "d/shards").iterdir()) == ["1x4x2x3", "1x4x3x2"]
    # A new shape comes after those that are there; one that has lost all its rows keeps its number.
    square = (1, 4, 2, 2)
    (tmp_path / "s/0.jpg").unlink()
    schema = Schema((square, TALL))
    keys = [*KEYS[1::2], "8.jpg"]
    written |= write(toy, tmp_path / "d", tmp_path / "s", schema, lambda i: {"bucket": int(i < 4)}, keys=keys)
    dataset = check_all(tmp_path / "d", {key: written[key] for key in keys})
    assert [(one.shape, one.rows) for one in dataset.buckets] == [(WIDE, 0), (TALL, 4), (square, 1)]


def test_a_bucket_that_no_row_has_is_not_named(toy, tmp_path):
    write(toy, tmp_path / "d", tmp_path / "s", Schema((WIDE, TALL)), keys=KEYS)
    assert [one.shape for one in Dataset.open(tmp_path / "d").buckets] == [WIDE]


# --- groups ---

FRAMES = [f"frame{i}.jpg" for i in range(12)]  # in key order frame10 comes before frame2
OF = [2, 0, 2, 1, 0, 2, 2, 1, 2, 0, 2, 1]  # frames 0, 2, 5, 6, 8 and 10 are of the third trajectory


def frame(i):
    return {"group": f"trajectory{OF[i]}", "order": i * 10}


def test_a_group_is_one_contiguous_read_in_its_order(toy, tmp_path):
    schema = Schema(((1, 4, 2, 2),))
    written = write(toy, tmp_path / "d", tmp_path / "s", schema, frame, unit_rows=4, keys=FRAMES)
    dataset = check_all(tmp_path / "d", written)
    assert len(dataset.groups) == 3 and dataset.groups.key(2) == "trajectory2"
    assert [dataset.key(i) for i in range(*dataset.groups.samples(2).indices(12))] == [
        FRAMES[i] for i in (0, 2, 5, 6, 8, 10)
    ]
    assert dataset.groups.order.tolist() == [10, 40, 90, 30, 70, 110, 0, 20, 50, 60, 80, 100]
    # Units of 4: group 0 alone (3), group 1 (3), and group 2, which is larger than a unit.
    assert [record.rows for record in dataset.shards] == [3, 3, 6]
    for group in range(3):
        shard, first, count = dataset.group_rows(group)
        rows = dataset.open_shard(shard).columns["moments"][first : first + count]
        members = [FRAMES[i] for i in range(12) if OF[i] == group]
        np.testing.assert_array_equal(rows, np.stack([written[key][0] for key in members]))
    for bad in (-1, 3):
        with pytest.raises(ValueError, match="expected a group from 0 to 2"):
            dataset.group_rows(bad)


def test_a_group_that_changes_is_encoded_anew_and_no_other(toy, tmp_path):
    schema = Schema(((1, 4, 2, 2),))
    written = write(toy, tmp_path / "d", tmp_path / "s", schema, frame, unit_rows=4, keys=FRAMES)
    # Lost: a frame in the middle of trajectory 2.
    keep = [i for i in range(12) if i != 6]
    again = write(
        toy,
        tmp_path / "d",
        tmp_path / "s",
        schema,
        lambda i: frame(keep[i]),
        unit_rows=4,
        keys=[FRAMES[i] for i in keep],
    )
    assert sorted(again) == sorted(FRAMES[i] for i in (0, 2, 5, 8, 10))
    dataset = check_all(tmp_path / "d", {key: (written | again)[key] for key in (FRAMES[i] for i in keep)})
    assert dataset.group_rows(2)[2] == 5
    # Come back: the old rows lie among dead ones, but the group has to be in one piece, so it is encoded once more.
    again = write(toy, tmp_path / "d", tmp_path / "s", schema, frame, unit_rows=4, keys=FRAMES)
    assert sorted(again) == sorted(FRAMES[i] for i in range(12) if OF[i] == 2)
    assert [Dataset.open(tmp_path / "d").group_rows(group)[2] for group in range(3)] == [3, 3, 6]
    # Nothing has changed: no new generation.
    assert write(toy, tmp_path / "d", tmp_path / "s", schema, frame, unit_rows=4, keys=FRAMES) == {}
    assert Dataset.open(tmp_path / "d").generation == 3


def test_a_bad_frame_leaves_its_group_in_one_piece(toy, tmp_path):
    schema = Schema(((1, 4, 2, 2),))
    entries = []
    for i, key in enumerate(FRAMES):
        toy.write_file(tmp_path / "s", key, key.encode())
        stat = (tmp_path / "s" / key).stat()
        entries.append(Entry(key, str(tmp_path / "s" / key), -1, stat.st_size, stat.st_mtime_ns, **frame(i)))
    for generation in (1, 1):  # the second time nothing is to do: what is in quarantine stays there
        with DatasetWriter.open(tmp_path / "d", toy.PROVENANCE, [], unit_rows=4, schema=schema) as writer:
            units = writer.plan(entries)
            for unit in units:
                rows = random_rows(schema, unit)
                bad = [Quarantined(one.key, one.digest, "bad", "Error") for one in unit.items if one.key == FRAMES[5]]
                keep = np.array([key != FRAMES[5] for key in rows.keys])
                rows = replace(
                    rows, keys=[key for key in rows.keys if key != FRAMES[5]], payload=rows.payload[keep], extras={}
                )
                writer.commit(unit, rows, bad)
            assert writer.finish().generation == generation
    assert units == [] and Dataset.open(tmp_path / "d").group_rows(2)[2] == 5


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (lambda i: {"group": "a" if i else ""}, "a group for every file or for none"),
        (lambda i: {"group": "a", "order": i // 2}, "places of their own"),
        (lambda i: {"group": "a", "order": i, "bucket": i % 2}, "of one bucket"),
        (lambda i: {"bucket": 2}, "bucket from 0 to 1, got 2"),
    ],
)
def test_refuses_entries(toy, tmp_path, places, message):
    with pytest.raises(ValueError, match=message):
        write(toy, tmp_path / "d", tmp_path / "s", Schema((WIDE, TALL)), places, keys=KEYS)


def test_a_dataset_keeps_its_schema(toy, tmp_path):
    write(toy, tmp_path / "d", tmp_path / "s", Schema((WIDE,)), keys=KEYS)
    before = toy.contents(tmp_path / "d")
    for other in (
        Schema(((1, 2, 2, 3),), "latents"),
        Schema((WIDE,), extras=(Field("text", "U8", (RAGGED,)),)),
        Schema(((2, 4, 2, 3),)),
        Schema(((1, 4, 2, 3, 1),)),
    ):
        with pytest.raises(ValueError, match="encode into another folder"):
            DatasetWriter.open(tmp_path / "d", toy.PROVENANCE, [], unit_rows=3, schema=other)
    assert toy.contents(tmp_path / "d") == before


def test_refuses_rows_that_are_not_the_schema(toy, tmp_path):
    schema = Schema(((1, RAGGED, 3),), "tokens", (Field("text", "U8", (RAGGED,)),))
    source = tmp_path / "s"
    toy.write_file(source, "a", b"a")
    stat = (source / "a").stat()
    entries = [Entry("a", str(source / "a"), -1, stat.st_size, stat.st_mtime_ns)]
    good = np.ones((4, 3), np.float16)
    text = {"text": [np.zeros(2, np.uint8)]}
    with DatasetWriter.open(tmp_path / "d", toy.PROVENANCE, [], unit_rows=1, schema=schema) as writer:
        (unit,) = writer.plan(entries)
        for rows in (
            Rows(["a"], good[None], extras=text),  # an array where rows have lengths of their own
            Rows(["a"], [np.ones((4, 2), np.float16)], extras=text),
            Rows(["a"], [good, good], extras=text),
            Rows(["a"], [good[:0]], extras=text),
            Rows(["a"], [good]),
            Rows(["a"], [good], extras={**text, "more": good}),
            Rows(["a"], [good], extras={"text": [np.zeros(2, np.int8)]}),
            Rows(["a"], [good], extras={"text": np.zeros((1, 2), np.uint8)}),
            Rows(["a"], [good.astype(np.int8)], extras=text),  # int8 without a scale
            Rows(["a"], [good], scale=[np.ones(4, np.float32)], extras=text),
            Rows(["a"], [good.astype(np.int8)], scale=[np.ones(3, np.float32)], extras=text),
            Rows(["a"], [good.astype(np.int8)], scale=[np.ones(4, np.float64)], extras=text),
        ):
            with pytest.raises(ValueError, match="expected"):
                writer.commit(unit, rows)
        writer.commit(unit, Rows(["a"], [good], extras=text))
        writer.finish()
    assert len(Dataset.open(tmp_path / "d")) == 1


def test_an_infinite_scale_goes_into_quarantine(toy, tmp_path):
    schema = Schema((WIDE,))
    toy.write_file(tmp_path / "s", "a", b"a")
    toy.write_file(tmp_path / "s", "b", b"b")
    stats = {key: (tmp_path / "s" / key).stat() for key in "ab"}
    entries = [Entry(key, str(tmp_path / "s" / key), -1, one.st_size, one.st_mtime_ns) for key, one in stats.items()]
    with DatasetWriter.open(tmp_path / "d", toy.PROVENANCE, [], unit_rows=2, schema=schema) as writer:
        (unit,) = writer.plan(entries)
        scale = np.array([[1], [np.inf]], np.float32)
        writer.commit(unit, Rows(["a", "b"], np.ones((2, *WIDE), np.int8), scale=scale))
        assert writer.finish().quarantined == 1


def test_statistics_of_chunks_equal_those_of_all(monkeypatch):
    values = np.random.default_rng(0).standard_normal((50, 1, 6, 4)).astype(np.float32)
    whole = Statistics.of(values, "F32", "tokens")
    monkeypatch.setattr("fastlatent.store.statistics.CHUNK_BYTES", 64)
    parts = Statistics.of(values, "F32", "tokens")
    assert whole.count == parts.count == 300
    np.testing.assert_allclose(parts.m2, whole.m2, rtol=1e-13)


def entries_of(toy, source, keys, places):
    entries = []
    for i, key in enumerate(keys):
        if not (source / key).exists():
            toy.write_file(source, key, key.encode())
        stat = (source / key).stat()
        entries.append(Entry(key, str(source / key), -1, stat.st_size, stat.st_mtime_ns, **places(i)))
    return entries


@pytest.mark.parametrize("committed", [0, 1, 2])
@pytest.mark.parametrize("keys", [["a", "b", "c", "d"], ["a", "c"], ["c", "a", "b"]])
def test_a_group_that_changes_while_a_plan_is_pending_stays_in_one_piece(toy, tmp_path, committed, keys):
    schema, source = Schema(((1, 4, 2, 2),)), tmp_path / "s"

    def places(names):
        return lambda i: {"group": "z" if names[i] in "xy" else "g", "order": i}

    first = ["a", "b", "c", "x", "y"]
    with DatasetWriter.open(tmp_path / "d", toy.PROVENANCE, [], unit_rows=3, schema=schema) as writer:
        for unit in writer.plan(entries_of(toy, source, first, places(first)))[:committed]:
            writer.commit(unit, random_rows(schema, unit))
    now = [*keys, "x", "y"]
    with DatasetWriter.open(tmp_path / "d", toy.PROVENANCE, [], unit_rows=3, schema=schema) as writer:
        for unit in writer.plan(entries_of(toy, source, now, places(now))):
            writer.commit(unit, random_rows(schema, unit))
        writer.finish()
    dataset = Dataset.open(tmp_path / "d")
    assert [dataset.group_rows(i)[2] for i in range(2)] == [len(keys), 2]
    assert [dataset.key(i) for i in range(len(dataset))] == now
    assert not verify(tmp_path / "d", full=True, threads=1).findings


def test_groups_of_a_dataset_that_had_none(toy, tmp_path):
    schema = Schema(((1, 4, 2, 2),))
    write(toy, tmp_path / "d", tmp_path / "s", schema, unit_rows=4, keys=FRAMES)
    # In key order 0, 1, 10, 11, 2 ... no group of these lies in one piece.
    again = write(toy, tmp_path / "d", tmp_path / "s", schema, frame, unit_rows=4, keys=FRAMES)
    assert sorted(again) == sorted(FRAMES)
    assert [Dataset.open(tmp_path / "d").group_rows(i)[2] for i in range(3)] == [3, 3, 6]


def test_a_group_in_pieces_is_found(toy, tmp_path):
    write(toy, tmp_path / "d", tmp_path / "s", Schema(((1, 4, 2, 2),)), frame, unit_rows=4, keys=FRAMES)
    assert not verify(tmp_path / "d", full=True, threads=1).findings
    root = json.loads((tmp_path / "d/dataset.json").read_text())
    record = root["indexes"][0]
    file = tmp_path / "d" / record["path"]
    index = Shard.open(file)
    index.columns["order"][1] = index.columns["order"][0]
    data = bytes(index.mapping)
    file.write_bytes(data)
    record |= {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    root["xxh3_128"] = root_digest(root)
    (tmp_path / "d/dataset.json").write_text(json.dumps(root))
    (finding,) = verify(tmp_path / "d", full=True, threads=1).findings
    assert "before it" in str(finding)


def test_a_unit_of_bad_files_alone(toy, tmp_path):
    schema = Schema(((1, RAGGED, 3),), "tokens")
    entries = entries_of(toy, tmp_path / "s", ["a", "b"], lambda i: {})
    with DatasetWriter.open(tmp_path / "d", toy.PROVENANCE, [], unit_rows=1, schema=schema) as writer:
        first, second = writer.plan(entries)
        writer.commit(first, Rows([], []), [Quarantined("a", first.items[0].digest, "bad", "Error")])
        writer.commit(second, Rows(["b"], [np.ones((2, 3), np.float32)]))
        assert writer.finish().quarantined == 1
    assert Dataset.open(tmp_path / "d").buckets[0].dtype == "F32"


def test_a_journal_about_to_be_written_stays(toy, tmp_path, source):
    # Between making its file and writing its first line another writer opens the dataset.
    toy.build(tmp_path / "d", source)
    empty = tmp_path / "d/journal" / f"{'0' * 32}.jsonl"
    empty.parent.mkdir(exist_ok=True)
    empty.touch()
    with DatasetWriter.open(tmp_path / "d", toy.PROVENANCE, ["ant", "bee", "cat"], unit_rows=2, schema=toy.SCHEMA):
        assert empty.exists()


@pytest.mark.parametrize("other", [{"dtype": "I8"}, {"shape": (1, 8, 2, 2)}, {"shape": (2, 4, 2, 2)}])
def test_datasets_of_other_rows_are_not_merged(toy, tmp_path, other):
    shape = other.pop("shape", (1, 4, 2, 2))
    write(toy, tmp_path / "a", tmp_path / "s", Schema(((1, 4, 2, 2),)), keys=["a", "b"])
    write(toy, tmp_path / "b", tmp_path / "s", Schema((shape,)), keys=["c", "d"], **other)
    with pytest.raises(ValueError, match="rows of one kind and dtype"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", copy=False)
    assert not (tmp_path / "c").exists()


def test_a_filter_takes_groups_as_a_whole(toy, tmp_path):
    write(toy, tmp_path / "d", tmp_path / "s", Schema(((1, 4, 2, 2),)), frame, unit_rows=4, keys=FRAMES)
    with pytest.raises(ValueError, match="a group meets as a whole .*1 groups meet them in part, 'trajectory0' first"):
        select(tmp_path / "d", Conditions(keys=("frame1.jpg",)), tmp_path / "c", copy=False)
    whole = tuple(FRAMES[i] for i in range(12) if OF[i] == 2)
    select(tmp_path / "d", Conditions(keys=whole), tmp_path / "c", copy=False)
    assert Dataset.open(tmp_path / "c").group_rows(0)[2] == 6
