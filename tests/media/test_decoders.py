import importlib.util
import re
import subprocess
import sys
import warnings
import zlib

import media_corpus
import numpy as np
import pytest
import torch
from media_corpus import encode, exif, picture
from PIL import Image

from fastlatent.media.decoders import NAMES, choose_decoder, luma, open_decoder
from fastlatent.media.image_error import MAX_PIXELS
from fastlatent.media.images import DECODE_RULE, ImageError, read_image
from fastlatent.media.jpeg_header import JpegHeader, plain_jpeg
from fastlatent.media.orientation import upright

PACKAGES = {"dali": "nvidia.dali", "nvimagecodec": "nvidia.nvimgcodec"}
GOOD, BAD = media_corpus.good_files(), media_corpus.bad_files()
JPEG = encode(picture(), "JPEG")


def opened(name, device="cpu", **options):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return open_decoder(name, device=device, **{"channels": 3, "threads": 2, **options})


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def expected(data, channels=3):
    try:
        return read_image(data, channels=channels)
    except ImageError as error:
        return error


def assert_same(result, data, channels=3):
    wanted = expected(data, channels)
    if isinstance(wanted, ImageError):
        assert isinstance(result, ImageError) and str(result) == str(wanted)
    else:
        assert result.dtype == wanted.dtype and result.flags.c_contiguous
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_corpus_at_once(name, channels):
    # Good and bad files mixed: a bad one costs itself alone, and none changes its place.
    keys = sorted({**GOOD, **BAD}, key=lambda key: zlib.crc32(key.encode()))
    files = [{**GOOD, **BAD}[key][0] for key in keys]
    decoder = opened(name, channels=channels)
    results = decoder.decode(files)
    assert len(results) == len(files)
    for key, data, result in zip(keys, files, results, strict=True):
        assert_same(result, data, channels)
        assert isinstance(result, ImageError) == (key in BAD), key
        if key in BAD:
            assert re.search(BAD[key][1], str(result))
    decoder.close()


def test_every_jpeg_is_bit_for_bit_pillows(name):
    # Sizes around the block of 8 and the chroma block of 16, one pixel, and slivers.
    sizes = [(1, 1), (1, 40), (40, 1), (7, 9), (8, 8), (15, 17), (16, 16), (33, 31)]
    files = [
        encode(picture(seed, height, width).convert(mode), "JPEG", quality=quality, progressive=progressive)
        for seed, (height, width) in enumerate(sizes)
        for mode in ("RGB", "L")
        for quality in (1, 75, 100)
        for progressive in (False, True)
    ]
    assert all(plain_jpeg(data) for data in files)
    decoder = opened(name)
    for data, result in zip(files, decoder.decode(files), strict=True):
        assert_same(result, data)
    decoder.close()


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130])  # DALI takes 64 at once; the last batch is short
def test_order_and_batches_of_any_size(name, count):
    files = [encode(picture(i, 8 + i % 5, 9), "JPEG") for i in range(count)]
    decoder = opened(name)
    for _ in range(2):  # nothing of a batch stays behind
        results = decoder.decode(files)
        assert len(results) == count
        for data, result in zip(files, results, strict=True):
            assert_same(result, data)
    decoder.close()


def broken_jpeg():
    """Plain by its header, with an end marker, and refused by every decoder: a Huffman table of no codes."""
    at = JPEG.index(b"\xff\xc4")
    return JPEG[: at + 5] + b"\xff" * 16 + JPEG[at + 21 :]


def test_one_bad_jpeg_costs_itself_alone(name):
    assert plain_jpeg(broken_jpeg()) and isinstance(expected(broken_jpeg()), ImageError)
    decoder = opened(name)
    for files in ([broken_jpeg()], [JPEG, broken_jpeg(), JPEG], [broken_jpeg()] * 2 + [JPEG]):
        for data, result in zip(files, decoder.decode(files), strict=True):
            assert_same(result, data)
    decoder.close()


def test_neighbours_of_a_bad_file_are_still_the_codecs(monkeypatch):
    # What becomes of a file must not depend on its batch: on a GPU the codec's pixels are not Pillow's.
    decoder = opened("dali")
    read = []
    monkeypatch.setattr(decoder.pool, "read", lambda data: read.append(data) or ImageError("bad"))
    results = decoder.decode([JPEG, broken_jpeg(), JPEG])
    assert read == [broken_jpeg()]
    assert [isinstance(result, ImageError) for result in results] == [False, True, False]
    decoder.close()


def test_floats_get_the_stated_range(name):
    values = np.linspace(-1, 3, 12, dtype=np.float32).reshape(3, 4)
    decoder = opened(name, input_range=(-1, 3))
    (pixels,) = decoder.decode([media_corpus.tiff(values, photometric="minisblack")])
    assert pixels.dtype == np.float32 and pixels.min() == 0 and pixels.max() == 1
    decoder.close()


def test_the_rule_names_what_decodes_jpegs(name):
    decoder = opened(name)
    assert (decoder.name, decoder.device) == (name, "cpu")
    assert decoder.rule == (DECODE_RULE if name == "pillow" else f"{DECODE_RULE} jpeg:{name}-cpu-1")
    decoder.close()


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="'gdal' is unknown; expected one of pillow, dali, nvimagecodec"):
        open_decoder("gdal", channels=3, device="cpu", threads=1)


@pytest.mark.parametrize(("name", "extra"), [("dali", "dali"), ("nvimagecodec", "nvimgcodec")])
def test_a_missing_package_names_its_extra(name, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, f"fastlatent.media.{name}_decoder", None)
    with pytest.raises(ValueError, match=f"{name} cannot be imported .*pip install 'fastlatent\\[{extra}\\]'"):
        open_decoder(name, channels=3, device="cpu", threads=1)


@pytest.mark.parametrize("name", ["dali", "nvimagecodec"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said where there is no GPU")
def test_a_gpu_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"decoder {name} does not work on GPU 0: "):
        opened(name, device="cuda:0")


def test_a_codec_that_refuses_everything_is_refused(monkeypatch):
    # Else Pillow would decode every file, and the dataset say that the codec did.
    module = pytest.importorskip("fastlatent.media.nvimagecodec_decoder")
    monkeypatch.setattr(module.NvImageCodecJpegs, "decode", lambda self, files: [None] * len(files))
    with pytest.raises(ValueError, match="nvimagecodec does not work on the CPU: it refused a sound JPEG"):
        opened("nvimagecodec")


def test_auto_is_a_visible_rule(monkeypatch):
    assert choose_decoder("cpu") == ("pillow", "no GPU is used")
    missing = {name: importlib.util.find_spec("nvidia") is None for name in PACKAGES}
    for gone, wanted in (((), "dali"), (("dali",), "nvimagecodec"), (("dali", "nvimagecodec"), "pillow")):
        for package in gone:
            monkeypatch.setitem(sys.modules, f"fastlatent.media.{package}_decoder", None)
        chosen, reason = choose_decoder("cuda")
        if not any(missing.values()):
            assert chosen == wanted
        for package in gone:
            assert f"decoder {package} cannot be imported" in reason


def test_no_torch_on_the_cpu():
    code = (
        "import sys; from fastlatent.media.decoders import open_decoder\n"
        "decoder = open_decoder('pillow', channels=3, device='cpu', threads=1); decoder.decode([b'x'])\n"
        "decoder.close()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_luma_is_the_same_on_every_device():
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rgb[0, :2] = [[0, 0, 0], [255, 255, 255]]
    wanted = np.asarray(Image.fromarray(rgb).convert("L"))[:, :, None]
    np.testing.assert_array_equal(luma(rgb), wanted)
    np.testing.assert_array_equal(luma(torch.from_numpy(rgb)).numpy(), wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_is_the_same_on_every_device(orientation):
    rgb = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    turned = upright(torch.from_numpy(rgb), orientation)
    assert turned.is_contiguous()
    np.testing.assert_array_equal(turned.numpy(), upright(rgb, orientation))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", ["dali", "nvimagecodec"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_corpus_on_a_gpu(name, channels):
    decoder = opened(name, "cuda", channels=channels)
    keys = sorted({**GOOD, **BAD})
    results = decoder.decode([{**GOOD, **BAD}[key][0] for key in keys])
    torch.cuda.synchronize()
    for key, result in zip(keys, results, strict=True):
        wanted = expected({**GOOD, **BAD}[key][0], channels)
        if key in BAD:
            assert isinstance(result, ImageError) and str(result) == str(wanted)
            continue
        assert str(result.device) == decoder.device and tuple(result.shape) == wanted.shape
        difference = abs(result.cpu().numpy().astype(np.float64) - wanted)
        # Another inverse DCT and colour conversion, each rounding its own way; other files are Pillow's bit for bit.
        plain = plain_jpeg(GOOD[key][0]) is not None
        assert difference.max() <= (8 if plain else 0) and difference.mean() <= 1, key
    decoder.close()


# plain_jpeg


def test_what_is_plain():
    image = picture()
    height, width = media_corpus.HEIGHT, media_corpus.WIDTH
    for key, (data, _) in {**GOOD, **BAD}.items():
        header = plain_jpeg(data)
        odd = ("cmyk", "rgb.jpg", "one pixel", "tail")
        wanted = data[:2] == b"\xff\xd8" and key in GOOD and not any(word in key for word in odd)
        if "one pixel" in key:
            assert header == JpegHeader(1, 1, 1)
        elif wanted:
            assert (header.height, header.width) == (height, width)  # before the orientation
        else:
            assert header is None, key
    for orientation in range(1, 9):
        assert plain_jpeg(encode(image, "JPEG", exif=exif(orientation))).orientation == orientation
    for value in (0, 9, 65535):  # no orientations: upright
        assert plain_jpeg(encode(image, "JPEG", exif=exif(value))).orientation == 1
    assert plain_jpeg(encode(image, "JPEG", exif=b"Exif\0\0garbage that is no TIFF")).orientation == 1


def test_what_decoders_would_treat_differently_is_not_plain():
    frame = JPEG.index(b"\xff\xc0")
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>"
    segment = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp
    block = exif(6).tobytes()
    twice = (b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block) * 2
    arithmetic = JPEG[: frame + 1] + b"\xc9" + JPEG[frame + 2 :]
    twelve_bits = JPEG[: frame + 4] + b"\x0c" + JPEG[frame + 5 :]
    side = int(MAX_PIXELS**0.5) + 1
    huge = JPEG[: frame + 5] + side.to_bytes(2, "big") * 2 + JPEG[frame + 9 :]
    no_height = JPEG[: frame + 5] + b"\0\0" + JPEG[frame + 7 :]  # it follows in a later marker
    components = b"".join(
        number + JPEG[frame + 11 + 3 * i : frame + 13 + 3 * i] for i, number in enumerate((b"R", b"G", b"B"))
    )
    for data in (
        JPEG[:-1],
        JPEG[:2] + segment + JPEG[2:],
        JPEG[:2] + twice + JPEG[2:],
        arithmetic,
        twelve_bits,
        huge,
        no_height,
        JPEG[: frame + 10] + components + JPEG[frame + 19 :],
        JPEG[:2] + JPEG[-2:],
        b"\xff\xd8\xff\xd9",
        b"",
    ):
        assert plain_jpeg(data) is None
    assert plain_jpeg(JPEG[:2] + b"\xff\xff" + JPEG[3:]) == plain_jpeg(JPEG)  # fill bytes before a marker


def test_no_damaged_header_escapes():
    data = encode(picture(), "JPEG", exif=exif(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of broken EXIF
        for at in range(700):
            for byte in (0x00, 0xFF, data[at] ^ 0x81):
                plain_jpeg(data[:at] + bytes([byte]) + data[at + 1 :])
