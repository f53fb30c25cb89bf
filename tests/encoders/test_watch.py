import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.watch import OverflowWatch, precision_warning


class Overflowing:
    """Encodes to 1,000 times the pixels, which in half precision ends above 65,504; its float32 copy says so by +1."""

    force_upcast = True
    upcasts = 0

    def encode(self, pixels: Tensor) -> Tensor:
        return (pixels.half() * 1000).float()

    def upcast(self):
        self.upcasts += 1
        full = Overflowing()
        full.encode = lambda pixels: pixels * 1000 + 1  # type: ignore[method-assign]
        return full


def batch(*values):
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()


def test_rows_that_overflow_are_encoded_again_and_counted():
    vae = Overflowing()
    watch = OverflowWatch(vae, torch.float16)
    assert torch.equal(watch.encode(batch(1.0, 2.0)), batch(1000.0, 2000.0))
    assert (watch.retried, vae.upcasts) == (0, 0)  # nothing is copied before it is needed
    # One value of a row is enough, infinities of both signs count.
    pixels = batch(1.0, 100.0, -3.0)
    pixels[2, 1, 1, 0] = -200
    want = torch.stack([pixels[0] * 1000, pixels[1] * 1000 + 1, pixels[2] * 1000 + 1])
    assert torch.equal(watch.encode(pixels), want)
    assert torch.equal(watch.encode(pixels), want)
    assert (watch.retried, vae.upcasts) == (4, 1)


def test_the_whole_batch_goes_through_float32():
    seen = []
    vae = Overflowing()
    full = vae.upcast()
    full.encode = lambda pixels: seen.append(pixels) or pixels
    vae.upcast = lambda: full
    pixels = batch(1.0, 100.0)
    OverflowWatch(vae, torch.float16).encode(pixels)
    assert len(seen) == 1
    assert torch.equal(seen[0], pixels)  # batch size and padding as before: they change last bits


def test_what_stays_non_finite_is_left_so():
    watch = OverflowWatch(Overflowing(), torch.float16)
    got = watch.encode(batch(float("nan"), 1.0))
    assert got[0].isnan().all()
    assert torch.equal(got[1:], batch(1000.0))
    assert watch.retried == 1


def test_float32_is_not_repeated():
    watch = OverflowWatch(Overflowing(), torch.float32)
    assert watch.encode(batch(100.0)).isinf().all()
    assert watch.retried == 0


def test_any_engine_can_be_watched():
    def engine(pixels):
        return torch.where(pixels > 5, torch.inf, pixels)

    watch = OverflowWatch(Overflowing(), torch.bfloat16, engine)
    assert torch.equal(watch.encode(batch(2.0, 7.0)), batch(2.0, 7001.0))
    assert torch.equal(watch.repair(batch(7.0), batch(torch.nan)), batch(7001.0))
    assert watch.retried == 2


def test_a_real_autoencoder_that_overflows(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=8)
    with torch.no_grad():
        model.quant_conv.weight *= 3e5  # the network is well, its last layer leaves float16's range
    model.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    half = load_autoencoder(tmp_path, "cpu", torch.float16)
    assert not half.encode(pixels).isfinite().all()
    watch = OverflowWatch(half, torch.float16)
    got = watch.encode(pixels)
    assert got.isfinite().all()
    assert watch.retried == 2
    assert torch.equal(got, load_autoencoder(tmp_path).encode(pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_warning_is_for_float16_alone(dtype, tmp_path):
    asked = precision_warning(Overflowing(), dtype)
    assert (asked is not None) == (dtype == torch.float16)
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    for force in (True, False):
        model.register_to_config(force_upcast=force)
        model.save_pretrained(tmp_path)
        got = precision_warning(load_autoencoder(tmp_path, "cpu", dtype), dtype)
        assert (got is not None) == (force and dtype == torch.float16)
