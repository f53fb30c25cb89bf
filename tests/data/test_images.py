import json
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastlatent.data import images as images_module
from fastlatent.data.images import ImageLoader, mirrored
from fastlatent.ops import sample_posterior
from fastlatent.sources.items import Source
from fastlatent.sources.open import open_source
from fastlatent.store.records import key_hashes


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def loader(folder, batch_size=4, **options):
    options = {"size": 8, "channels": 3, "mirror": False, "seed": 0} | options
    return ImageLoader(open_source(folder), batch_size, **options)


def pixels(folder, name):
    return torch.from_numpy(np.asarray(Image.open(folder / name)).transpose(2, 0, 1) / 127.5 - 1).float()


def names(batch):
    """Which of 0.png … 9.png a batch holds."""
    known = key_hashes([b"%d.png" % i for i in range(10)]).view(np.int64).tolist()
    return [known.index(one) for one in batch["key_hash"].tolist()]


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]


def test_batches_are_the_images_in_order(folder):
    images = loader(folder)
    assert images.steps_per_epoch == 2
    for step in (0, 1, 2, 7):  # the last one not in sequence: the thread begins anew
        batch = images.batch(step)
        assert (batch["pixels"].shape, batch["pixels"].dtype) == ((4, 3, 8, 8), torch.float32)
        epoch, indices = images.order.indices(step)
        assert (batch["epoch"], names(batch), batch["label"].tolist()) == (epoch, indices.tolist(), [-1] * 4)
        for image, i in zip(batch["pixels"], indices.tolist(), strict=True):
            torch.testing.assert_close(image, pixels(folder, f"{i}.png"), rtol=0, atol=1e-6)
    assert set(batch) == {"pixels", "label", "key_hash", "epoch"}
    same(loader(folder, prefetch=0).batch(7), images.batch(7))
    same(images.samples(np.array([3, 3, 9])), loader(folder).samples(np.array([3, 3, 9]), epoch=0))
    assert names(images.samples(np.array([3, 3, 9]))) == [3, 3, 9]


def test_ranks_share_a_batch(folder):
    whole = loader(folder, mirror=True).batch(3)
    for rank in range(2):
        part = loader(folder, mirror=True, rank=rank, world_size=2).batch(3)
        for name in ("pixels", "label", "key_hash"):
            assert torch.equal(part[name], whole[name][rank::2])
    with pytest.raises(ValueError, match="must be a multiple of world_size 3"):
        loader(folder, world_size=3)


def test_bad_files_are_replaced_and_named(folder):
    (folder / "3.png").write_text("no picture")
    (folder / "4.png").write_bytes(b"")
    (folder / "9.png").write_bytes((folder / "8.png").read_bytes()[:60])  # the last one: 0 comes after it
    images = loader(folder, batch_size=10)
    (folder / "7.png").unlink()  # after the scan, which leaves out what is gone already
    _, indices = images.order.indices(0)
    instead = {3: 5, 4: 5, 7: 8, 9: 0}
    batch = images.batch(0)
    assert names(batch) == [instead.get(i, i) for i in indices.tolist()]
    for image, i in zip(batch["pixels"], names(batch), strict=True):
        torch.testing.assert_close(image, pixels(folder, f"{i}.png"), rtol=0, atol=1e-6)
    assert set(images.failures) == {"3.png", "4.png", "7.png", "9.png"}
    assert images.failures["4.png"] == "empty file"
    assert "7.png could not be read: No such file" in images.failures["7.png"]
    # The other rank alone meets other files, and replaces them alike.
    (folder / "7.png").write_text("no")
    part = loader(folder, batch_size=10, rank=1, world_size=2).batch(0)
    assert torch.equal(part["pixels"], batch["pixels"][1::2])


def test_bad_files_are_decoded_once(folder, monkeypatch):
    for i in (2, 3, 4):
        (folder / f"{i}.png").write_text("no")
    read = []
    source = open_source(folder)
    counting = Source(source.items, lambda item: (read.append(item.key), source.read(item))[1])
    images = ImageLoader(counting, 10, size=8, channels=3, mirror=False, seed=0, prefetch=0)
    for step in range(4):
        images.batch(step)
    # Once, but threads that come to one at the same time may each try it.
    assert max(read.count(f"{i}.png") for i in (2, 3, 4)) <= 3
    assert len(read) - sum(read.count(f"{i}.png") for i in (2, 3, 4)) == 40
    before = len(read)
    images.batch(4)
    assert len(read) - before == 10


def test_no_file_can_be_read(folder):
    for path in folder.iterdir():
        path.write_text("no")
    images = loader(folder)
    for _ in range(2):  # the thread ends with the error, and may be asked again
        with pytest.raises(
            ValueError, match=r"none of 10 images can be read; ('\d.png': no readable .*; ){2}"
        ) as caught:
            images.batch(2)
        assert str(caught.value).count("no readable") == 3


def test_a_network_is_asked_again(folder, monkeypatch):
    monkeypatch.setattr("fastlatent.sources.items.RETRY_SECONDS", (0.0, 0.0, 0.0))
    source, failures = open_source(folder), []

    def read(item):
        if item.key == "5.png" or (item.key == "6.png" and len(failures) < 2):
            failures.append(item.key)
            raise OSError("connection reset")
        if item.key == "7.png":
            raise ValueError("the archive is damaged")
        return source.read(item)

    images = ImageLoader(Source(source.items, read), 10, size=8, channels=3, mirror=False, seed=0)
    monkeypatch.setattr(images_module, "READERS", 1)
    assert sorted(names(images.samples(np.array([6])))) == [6]
    assert names(images.samples(np.array([5, 7]))) == [6, 8]
    assert set(images.failures) == {"5.png", "7.png"}
    assert "3 times: connection reset" in images.failures["5.png"]


def test_mirrored_as_a_dataset_would(folder):
    images = loader(folder, batch_size=10, mirror=True, seed=3)
    count = 0
    for step in range(20):
        batch = images.batch(step)
        chosen = mirrored(batch["key_hash"], 3, step)
        both = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(10, 2, 4, 3)
        stored = sample_posterior(both, batch["key_hash"], seed=3, epoch=step, has_logvar=False)
        assert torch.equal(stored[:, 0, 0] == 1, chosen)
        for image, i, flipped in zip(batch["pixels"], names(batch), chosen.tolist(), strict=True):
            plain = pixels(folder, f"{i}.png")
            torch.testing.assert_close(image, plain.flip(-1) if flipped else plain, rtol=0, atol=1e-6)
        count += int(chosen.sum())
    assert abs(count / 200 - 0.5) < 5 * 0.5 / 200**0.5


def test_sixteen_bits(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) + 1000
    Image.fromarray(values).save(tmp_path / "a.png")
    kept = loader(tmp_path, 1, channels=1).batch(0)["pixels"]
    torch.testing.assert_close(kept[0, 0].double(), torch.from_numpy(values / 65535 * 2 - 1), rtol=0, atol=1e-6)
    rounded = loader(tmp_path, 1, channels=1, preserve_input_precision=False).batch(0)["pixels"]
    eight = np.rint(values / 65535 * 255) / 127.5 - 1
    torch.testing.assert_close(rounded[0, 0].double(), torch.from_numpy(eight), rtol=0, atol=1e-6)
    assert len(rounded.unique()) == 1 < 64 == len(kept.unique())


def test_float_range(tmp_path):
    Image.fromarray(np.full((8, 8), 250.0, np.float32)).save(tmp_path / "a.tif")
    batch = loader(tmp_path, 1, channels=1, input_range=(200.0, 300.0)).batch(0)
    torch.testing.assert_close(batch["pixels"], torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"none of 1 images can be read.*250"):
        loader(tmp_path, 1, channels=1).batch(0)


def test_labels_and_conditions(folder):
    labelled = folder / "labelled"
    for name in ("a", "b"):
        (labelled / name).mkdir(parents=True)
        (labelled / name / "0.png").write_bytes((folder / "0.png").read_bytes())
    assert loader(labelled, 2).batch(0)["label"].sort().values.tolist() == [0, 1]

    samples = [{"output_rel": f"{i}.png", "metadata": {"wind": [i, 2.0]} if i % 2 else {}} for i in range(10)]
    (folder / "m.json").write_text(json.dumps({"output_root": ".", "samples": samples}))
    source = open_source(folder / "m.json", conditions="wind:2,wind_mag:1")
    batch = ImageLoader(source, 10, size=8, channels=3, mirror=False, seed=0).batch(0)
    for i, condition, present in zip(names(batch), batch["condition"], batch["condition_present"], strict=True):
        assert condition.tolist() == pytest.approx([i, 2.0, (i * i + 4) ** 0.5] if i % 2 else [0.0, 0.0, 0.0])
        assert present.tolist() == [i % 2, i % 2]


def test_other_crops_and_channels(folder):
    assert loader(folder, channels=1, size=4).batch(0)["pixels"].shape == (4, 1, 4, 4)
    with pytest.raises(ValueError, match="channels 1 or 3"):
        loader(folder, channels=2).batch(0)
    with pytest.raises(ValueError, match="batch_size: expected 1 to 10"):
        loader(folder, batch_size=11)


def test_batches_are_filled_ahead_and_the_thread_ends(folder):
    images = loader(folder)
    images.batch(0)
    ahead = images._ahead
    deadline = time.monotonic() + 10
    while len(ahead._ready) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(ahead._ready) == 2
    thread = ahead._thread
    assert thread in threading.enumerate()
    del images, ahead
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.needs_cuda
def test_cuda_batches_are_those_of_the_cpu(folder):
    images = loader(folder, mirror=True, device="cuda")
    for step in range(6):
        batch, plain = images.batch(step), loader(folder, mirror=True, prefetch=0).batch(step)
        assert batch["pixels"].is_cuda
        same({name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}, plain)
