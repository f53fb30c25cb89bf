"""LatentLoader: the same batches whatever happens, and a thread that never gets in the way."""

import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fastlatent.data.latents import LatentDataset, draw_latents
from fastlatent.data.loader import LatentLoader
from fastlatent.ops.read_rows import io_uring_refusal

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
BACKENDS = ["ram", "willneed", "pread", "io_uring"]


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        equal = torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        assert equal, name


def usable(backend):
    if backend == "io_uring" and (refusal := io_uring_refusal()):
        pytest.skip(f"io_uring: {refusal}")
    return backend


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "fastlatent loader"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_read_the_same_global_batches(path, world_size):
    dataset = LatentDataset(path)
    whole = LatentLoader(dataset, 8, seed=4)
    ranks = [LatentLoader(dataset, 8, seed=4, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(5):
        want = set(whole.batch(step)["key_hash"].tolist())
        got = [key for rank in ranks for key in rank.batch(step)["key_hash"].tolist()]
        assert len(got) == 8
        assert set(got) == want
        assert {rank.batch(step)["epoch"] for rank in ranks} == {step // 2}


def test_a_batch_is_what_the_order_says(path):
    dataset = LatentDataset(path)
    loader = LatentLoader(dataset, 8, seed=4)
    epoch, indices = loader.order.indices(3)
    batch = loader.batch(3)
    same(batch, {**dataset.gather(indices), "epoch": epoch})
    assert batch["moments"].shape == (8, 2, 4, 3, 3)


def test_iterating_covers_an_epoch_and_goes_on(path):
    loader = LatentLoader(LatentDataset(path), 8)
    assert len(loader) == 2
    epochs = [[batch["epoch"] for batch in loader] for _ in range(3)]
    assert epochs == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5])  # nowhere, inside an epoch, at its end, in later epochs
def test_state_resumes_in_the_middle(path, stop):
    dataset = LatentDataset(path)
    whole = LatentLoader(dataset, 8, seed=2)
    want = [batch for _ in range(4) for batch in whole]
    first = LatentLoader(dataset, 8, seed=2)
    got = []
    while len(got) < stop:
        for batch in first:
            got.append(batch)
            if len(got) == stop:
                break
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = LatentLoader(dataset, 8, seed=2)
    second.load_state_dict(state)
    while len(got) < len(want):
        got += list(second)
    for one, other in zip(got, want, strict=True):
        same(one, other)


@pytest.mark.parametrize(("options", "name"), [({"seed": 1}, "seed"), ({"batch_size": 4}, "batch_size")])
def test_state_of_another_order(path, options, name):
    dataset = LatentDataset(path)
    state = LatentLoader(dataset, **{"batch_size": 8, "seed": 0}).state_dict()
    with pytest.raises(ValueError, match=f"the state has {name}"):
        LatentLoader(dataset, **{"batch_size": 8, "seed": 0, **options}).load_state_dict(state)


# --- the determinism matrix ---

GLOBAL = 24  # a multiple of every world size


@pytest.fixture(scope="session")
def wide(make, tmp_path_factory):
    """61 rows with mirrors: batches of 24 leave 13 over; an epoch has 2 steps."""
    return make(tmp_path_factory.mktemp("wide"), 61, flips=2, unit_rows=7)


def trained_on(loader, step):
    """What a training step sees of each sample: its key and the drawn latent, mirror choice and noise included."""
    batch = loader.batch(step)
    latents = draw_latents(batch["moments"], batch["key_hash"], seed=11, epoch=batch["epoch"])
    return [
        (key, latent.numpy().tobytes()) for key, latent in zip(batch["key_hash"].tolist(), latents.cpu(), strict=True)
    ]


@pytest.fixture(scope="session")
def expected(wide):
    loader = LatentLoader(LatentDataset(wide), GLOBAL, seed=6, prefetch=0, backend="ram")
    return [trained_on(loader, step) for step in range(5)]  # 2.5 epochs


def test_epochs_and_steps_differ(expected):
    assert len({key for step in expected[:2] for key, _ in step}) == 2 * GLOBAL  # an epoch repeats nothing
    first, third = dict(expected[0] + expected[1]), dict(expected[2] + expected[3])
    common = first.keys() & third.keys()
    assert len(common) > 30
    assert all(first[key] != third[key] for key in common)  # noise is drawn anew


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
# Every step for one back end; the start of an epoch and its middle for the others.
@pytest.mark.parametrize(
    ("backend", "resume"),
    [("ram", resume) for resume in range(6)] + [(backend, resume) for backend in BACKENDS[1:] for resume in (2, 3)],
)
def test_nothing_changes_what_is_trained_on(wide, expected, world_size, backend, resume):
    dataset = LatentDataset(wide, backend=usable(backend))
    prefetch = (0, 1, 2, 5)[resume % 4]
    options = {"seed": 6, "world_size": world_size, "prefetch": prefetch}
    before = [LatentLoader(dataset, GLOBAL, rank=r, **options) for r in range(world_size)]
    # Resumed under another number of ranks than the state was taken with.
    other = {**options, "world_size": {1: 8, 2: 3, 3: 4, 4: 1, 8: 2}[world_size], "prefetch": 2}
    after = [LatentLoader(dataset, GLOBAL, rank=r, **other) for r in range(other["world_size"])]

    def steps(loaders):
        """A batch of every rank at a time, put together again as rank r reads every world_size-th sample."""
        batches = [trained_on(loader, loader.step) for loader in loaders]
        for loader in loaders:
            loader.step += 1
        return [batches[i % len(loaders)][i // len(loaders)] for i in range(GLOBAL)]

    got = [steps(before) for _ in range(min(resume, 5))]
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
    got += [steps(after) for _ in range(len(got), 5)]
    assert got == expected
    for loader in before + after:
        loader.close()


@pytest.mark.parametrize("order", [[0, 1, 2, 0, 0, 5, 6, 3, 4, 2]])
def test_steps_in_any_order(wide, order):
    dataset = LatentDataset(wide)
    ahead, plain = (LatentLoader(dataset, 8, seed=1, prefetch=p) for p in (3, 0))
    for step in order:
        same(ahead.batch(step), plain.batch(step))
    assert len(threads()) == 1  # a jump ends the thread that was on another way
    ahead.close()
    assert not threads()


# --- the thread ---


@pytest.mark.parametrize("device", DEVICES)
def test_batches_stay_as_they_are(path, device):
    loader = LatentLoader(LatentDataset(path), 8, seed=1, device=device, prefetch=1)
    batches = [batch for _ in range(6) for batch in loader]  # held, while every buffer is used several times over
    plain = LatentLoader(LatentDataset(path), 8, seed=1, prefetch=0)
    for step, batch in enumerate(batches):
        assert batch["moments"].device.type == device
        on_cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        same(on_cpu, plain.batch(step))


def test_fills_ahead_as_far_as_told(path, monkeypatch):
    dataset = LatentDataset(path)
    filled = []
    original = dataset.gather
    monkeypatch.setattr(dataset, "gather", lambda *args, **kw: filled.append(args) or original(*args, **kw))
    loader = LatentLoader(dataset, 8, prefetch=3)
    loader.batch(0)
    deadline = time.monotonic() + 10
    while len(filled) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(filled) == 4  # the one handed out, and three that wait
    loader.close()


def test_the_thread_ends_with_break_collection_and_close(path):
    loader = LatentLoader(LatentDataset(path), 8)
    for _ in loader:
        break
    assert len(threads()) == 1  # it waits: iterating goes on
    assert len(list(loader)) == 1
    loader.close()
    loader.close()
    assert not threads()
    loader.batch(0)
    del loader
    gc.collect()
    assert not threads()


def test_an_error_comes_at_its_step_and_again(path, monkeypatch):
    dataset = LatentDataset(path)
    loader = LatentLoader(dataset, 8, seed=3, prefetch=2)
    bad = loader.order.indices(2)[1].tolist()
    original = dataset.gather

    def gather(indices, **options):
        if indices.tolist() == bad:
            raise ValueError("damaged")
        return original(indices, **options)

    monkeypatch.setattr(dataset, "gather", gather)
    loader.batch(0)
    time.sleep(0.05)  # the thread is at step 2 by now
    loader.batch(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            loader.batch(2)
        assert not threads()
    monkeypatch.setattr(dataset, "gather", original)
    plain = LatentLoader(dataset, 8, seed=3, prefetch=0)
    same(loader.batch(2), plain.batch(2))  # repaired meanwhile: it goes on
    loader.close()


def test_state_counts_what_was_handed_out(path):
    loader = LatentLoader(LatentDataset(path), 8, prefetch=2)
    next(iter(loader))
    time.sleep(0.02)  # two more are ready
    assert loader.state_dict() == {"seed": 0, "batch_size": 8, "step": 1}
    loader.close()


def _child(loader, queue):
    queue.put([loader.batch(step)["key_hash"].tolist() for step in range(1, 4)])


def test_fork_while_the_thread_runs(path):
    loader = LatentLoader(LatentDataset(path), 8, seed=2, prefetch=2)
    loader.batch(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_child, args=(loader, queue)) for _ in range(3)]
    for child in children:
        child.start()
    want = [loader.batch(step)["key_hash"].tolist() for step in range(1, 4)]
    assert [queue.get(timeout=30) for _ in children] == [want] * 3
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    loader.close()


ENDLESS = """
import sys, time
from fastlatent import LatentDataset, LatentLoader
loader = LatentLoader(LatentDataset(sys.argv[1]), 8, prefetch=2)
loader.batch(0)
how = sys.argv[2]
if how == "raise":
    raise RuntimeError("the training failed")
if how == "slow":  # the thread is inside a fill when the interpreter ends
    loader.dataset.gather = lambda *args, **options: time.sleep(0.3) or {}
    loader.close()
    loader.batch(0)
    sys.exit(3)
loader.dataset.gather = lambda *args, **options: time.sleep(60)
print("waiting", flush=True)
loader.batch(10)
"""


@pytest.mark.parametrize(("how", "code"), [("raise", 1), ("slow", 3)])
def test_the_interpreter_ends(path, how, code):
    done = subprocess.run([sys.executable, "-c", ENDLESS, path, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert how != "raise" or done.stderr.endswith("RuntimeError: the training failed\n")
    assert how == "raise" or not done.stderr


def test_backend_is_reported_and_can_be_chosen(path, caplog):
    caplog.set_level("INFO")
    dataset = LatentDataset(path)
    loader = LatentLoader(dataset, 8)
    assert loader.choice is None
    loader.batch(0)
    assert loader.choice.name == "ram"  # it was just written
    assert [record.getMessage() for record in caplog.records if "rows are read by ram" in record.getMessage()]
    other = LatentLoader(dataset, 8, backend="pread")
    same(other.batch(0), loader.batch(0))
    assert (other.choice.name, dataset.choice.name) == ("pread", "ram")
    with pytest.raises(ValueError, match="backend: expected one of ram, willneed, pread, io_uring, got 'disk'"):
        LatentLoader(dataset, 8, backend="disk").batch(0)
    with pytest.raises(ValueError, match="expected prefetch >= 0, got -1"):
        LatentLoader(dataset, 8, prefetch=-1)
    loader.close()
    other.close()


def test_without_latents_no_shard_is_opened(path):
    loader = LatentLoader(LatentDataset(path, columns=("label", "key_hash")), 8)
    assert sorted(loader.batch(0)) == ["epoch", "key_hash", "label"]
    assert loader.choice is None
    loader.close()


# --- checks of rows ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_bit_is_never_trained_on(make, tmp_path, backend):
    dataset = LatentDataset(make(tmp_path, 12))
    shard = dataset.store.open_shard(1)
    payload = shard.columns["moments"]
    begin = payload.ctypes.data - np.frombuffer(shard.mapping, np.uint8).ctypes.data
    row_bytes = payload[0].nbytes
    with open(shard.path, "r+b") as file:
        file.seek(begin + 2 * row_bytes + 70)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    damaged = next(i for i in range(12) if (dataset.store.shard[i], dataset.store.row[i]) == (1, 2))
    loader = LatentLoader(LatentDataset(dataset.store.path), 4, check_rows=True, backend=usable(backend))
    for step in range(3):
        indices = loader.order.indices(step)[1].tolist()
        if damaged in indices:
            key = dataset.store.key(damaged)
            with pytest.raises(ValueError, match=rf"{shard.path}: row 2 \('{key}'\): expected xxh3_64 .*repair"):
                loader.batch(step)
        else:
            loader.batch(step)
    loader.close()
    unchecked = LatentLoader(LatentDataset(dataset.store.path), 12, prefetch=0)
    unchecked.batch(0)


def test_sound_rows_pass_the_check(make, tmp_path):
    for dtype in ("float32", "float16", "bfloat16"):
        dataset = LatentDataset(make(tmp_path / dtype, 11, dtype=dtype))
        loader = LatentLoader(dataset, 4, check_rows=True)
        assert len(list(itertools.chain(loader, loader))) == 4
        loader.close()


def test_ctrl_c_while_a_batch_is_awaited(path):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, path, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        # The thread sleeps for a minute inside its fill; nobody waits for it.
        _, error = process.communicate(timeout=20)
        assert "KeyboardInterrupt" in error
    finally:
        process.kill()
