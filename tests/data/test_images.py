import numpy as np
import pytest
import torch
from PIL import Image

from fastlatent.data.images import ImageLoader
from fastlatent.sources.image_folder import scan_image_folder


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def loader(folder, batch_size=4, **options):
    options = {"size": 8, "channels": 3, "mirror": False, "seed": 0} | options
    return ImageLoader(scan_image_folder(folder).items, batch_size, **options)


def pixels(folder, name):
    return torch.from_numpy(np.asarray(Image.open(folder / name)).transpose(2, 0, 1) / 127.5 - 1).float()


def test_batches_are_the_images_in_order(folder):
    images = loader(folder)
    for step in (0, 1, 2, 7):
        batch = images.batch(step)
        assert (batch.shape, batch.dtype) == ((4, 3, 8, 8), torch.float32)
        _, indices = images.order.indices(step)
        for image, i in zip(batch, indices.tolist(), strict=True):
            torch.testing.assert_close(image, pixels(folder, f"{i}.png"), rtol=0, atol=1e-6)
    assert torch.equal(loader(folder).batch(7), images.batch(7))


def test_bad_files_are_dropped_and_named(folder):
    (folder / "3.png").write_text("no picture")
    (folder / "5.png").write_bytes(b"")
    images = loader(folder, batch_size=10)
    (folder / "7.png").unlink()  # after the scan, which leaves out what is gone already
    batch = images.batch(0)
    assert len(batch) == 7
    assert set(images.failures) == {"3.png", "5.png", "7.png"}
    assert images.failures["5.png"] == "empty file"
    _, indices = images.order.indices(0)
    good = [i for i in indices.tolist() if i not in (3, 5, 7)]
    for image, i in zip(batch, good, strict=True):
        torch.testing.assert_close(image, pixels(folder, f"{i}.png"), rtol=0, atol=1e-6)


def test_a_batch_without_any_good_file(folder):
    for path in folder.iterdir():
        path.write_text("no")
    with pytest.raises(ValueError, match=r"no image of step 2 could be read; first: .*\.png: no readable"):
        loader(folder).batch(2)


def test_mirrored_images_keep_their_place_when_files_fail(folder):
    whole = loader(folder, batch_size=10, mirror=True)
    batch = whole.batch(0)
    _, indices = whole.order.indices(0)
    (folder / f"{indices[4]}.png").write_text("no")
    rest = loader(folder, batch_size=10, mirror=True).batch(0)
    assert torch.equal(rest, torch.cat([batch[:4], batch[5:]]))


def test_half_of_the_images_are_mirrored(folder):
    images = loader(folder, batch_size=10, mirror=True)
    count = 0
    for step in range(60):
        _, indices = images.order.indices(step)
        for image, i in zip(images.batch(step), indices.tolist(), strict=True):
            plain = pixels(folder, f"{i}.png")
            mirrored = torch.allclose(image, plain.flip(-1), atol=1e-6)
            assert mirrored != torch.allclose(image, plain, atol=1e-6)
            count += mirrored
    assert abs(count / 600 - 0.5) < 5 * 0.5 / 600**0.5


def test_grey(folder):
    batch = loader(folder, channels=1).batch(0)
    assert batch.shape == (4, 1, 8, 8)


def test_more_than_there_is(folder):
    with pytest.raises(ValueError, match="batch_size: expected 1 to 10"):
        loader(folder, batch_size=11)
