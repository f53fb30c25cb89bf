"""`load_teacher`: what tokens go through, identities, where weights are found, and engines."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from tiny_teachers import LAYOUTS, write_teacher
from torch import nn

import fastlatent.encoders.engines.engine as engine_module
from fastlatent.encoders.engines.choose import choose_clip_engine
from fastlatent.encoders.engines.engine import engine_settings, open_engine
from fastlatent.encoders.engines.numerics import fix_numerics, relative_error
from fastlatent.encoders.hub import from_hub
from fastlatent.encoders.teachers import load_teacher
from fastlatent.encoders.token_readout import MEAN, STD, Readout, normalize_clips
from fastlatent.encoders.videomae import PUBLISHED, VideoMAESizes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
CLIP = (4, 32, 32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(write_teacher(tmp_path_factory.mktemp("teacher"), "github"))


def clips_of(batch=2, clip=CLIP, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *clip, 3), dtype=torch.uint8, generator=draw)


def encoded(teacher, clips):
    return teacher.encode(teacher.prepare(clips))


# ---- pixels and tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_every_byte_is_normalised_to_the_same_bits_everywhere(device):
    clips = torch.arange(256, dtype=torch.uint8).reshape(1, 2, 16, 8, 1).expand(-1, -1, -1, -1, 3)
    got = normalize_clips(clips.to(device)).cpu()
    byte = clips.numpy().astype(np.float32).transpose(0, 4, 1, 2, 3)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1, 1) for values in (MEAN, STD))
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert np.array_equal(got.numpy(), (byte / np.float32(255) - mean) / std)
    with pytest.raises(ValueError, match=r"clips uint8 \[B, T, H, W, 3\], got float32 \[1, 3,"):
        normalize_clips(got)


@pytest.mark.parametrize("device", DEVICES)
def test_readout_in_float32_whatever_comes(device):
    tokens = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    half = tokens.bfloat16()
    for token_norm in ("none", "layer"):
        for pool, count in (("none", 6), ("space", 3), ("all", 1)):
            readout = Readout(8, 3, token_norm=token_norm, pool=pool, project_to=5, seed=7).to(device)
            want = half.double()
            if token_norm == "layer":
                want = (want - want.mean(-1, keepdim=True)) / (want.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            if pool == "space":  # two tokens of each time step follow each other
                want = torch.stack([want[:, 2 * t : 2 * t + 2].mean(1) for t in range(3)], 1)
            elif pool == "all":
                want = want.mean(1, keepdim=True)
            want = want @ readout.matrix.cpu().double()
            got = readout(half.to(device)).cpu()
            assert got.shape == (2, *readout.row_shape(6)) == (2, count, 5)
            assert got.dtype == torch.float32 and relative_error(got, want) < 1e-6
            assert readout(want.new_zeros(1, 6, 8).to(device)).dtype == torch.float64


def test_the_projection_is_drawn_from_its_seed_and_keeps_the_scale():
    one, again, other = (Readout(768, 8, project_to=384, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.matrix, again.matrix) and not torch.equal(one.matrix, other.matrix)
    white = torch.randn(400, 768, generator=torch.Generator().manual_seed(0))
    assert float((white @ one.matrix).std()) == pytest.approx(1, rel=0.01)
    told = [readout.identity()["projection"] for readout in (one, again, other)]
    assert told[0] == told[1] != told[2] and told[0]["to"] == 384 and len(told[0]["sha256"]) == 64
    assert Readout(768, 8).identity()["projection"] is None
    # Of numpy's Philox and its normal numbers: a numpy that draws others would make other datasets.
    digest = Readout(4, 1, project_to=2, seed=0).identity()["projection"]["sha256"]
    assert digest[:16] == DIGEST


DIGEST = "25ebb27f16ddb375"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_norm": "batch"}, "--token-norm none or layer"),
        ({"pool": "time"}, "--pool none, space, all; got 'none' and 'time'"),
        ({"project_to": 33}, "expected 1 to 32"),
        ({"project_to": -1}, "expected 1 to 32"),
        ({"layer": 3}, "has blocks 1 to 2"),
        ({"layer": -1}, "has blocks 1 to 2"),
    ],
)
def test_settings_that_are_not_possible(weights, settings, message):
    with pytest.raises(ValueError, match=message):
        load_teacher("videomaev2", weights, **settings)


# ---- VideoMAE as a ClipEncoder ---------------------------------------------------------------------------


def test_layers_norm_pooling_and_projection(weights):
    clips = clips_of()
    raw = load_teacher("videomaev2", weights)
    tokens = encoded(raw, clips)
    assert raw.payload == "tokens" and raw.clip == CLIP and raw.size_multiple == 16
    assert tokens.shape == (2, *raw.row_shape(*CLIP)) == (2, 8, 32)
    assert tokens.dtype == torch.float32
    assert torch.equal(encoded(load_teacher("videomaev2", weights, layer=2), clips), tokens)
    first = load_teacher("videomaev2", weights, layer=1)
    assert len(list(first.encoder()[0].blocks)) == 1  # what is above is not there
    with torch.no_grad():
        assert torch.equal(raw.encoder()[0].blocks[1](encoded(first, clips)), tokens)
    settings = {"token_norm": "layer", "pool": "space", "project_to": 4, "seed": 9}
    small = load_teacher("videomaev2", weights, **settings)
    assert small.row_shape(*CLIP) == (2, 4)
    assert torch.equal(encoded(small, clips), Readout(32, 2, **settings)(tokens))
    for wrong in ((4, 32, 48), (8, 32, 32)):
        with pytest.raises(ValueError, match="clips of 4 frames of 32×32 only, got"):
            raw.row_shape(*wrong)
        with pytest.raises(ValueError, match="clips of 4 frames of 32×32 only, got"):
            raw.encode(torch.zeros(1, 3, *wrong))
    with pytest.raises(ValueError, match=r"expected pixels \[B, 3, T, H, W\], got \[3, 4, 32, 32\]"):
        raw.encode(torch.zeros(3, *CLIP))


def test_one_model_has_one_identity_in_every_layout(tmp_path, weights):
    told = [load_teacher("videomaev2", str(write_teacher(tmp_path / name, name))).identity() for name in LAYOUTS]
    assert all(one == told[0] for one in told)
    assert json.loads(json.dumps(told[0])) == told[0]
    assert told[0]["mean"] == list(MEAN) and told[0]["clip"] == [4, 32, 32] and told[0]["layer"] == 2
    others = [
        load_teacher("videomaev2", weights, **settings).identity()
        for settings in ({"layer": 1}, {"token_norm": "layer"}, {"pool": "all"}, {"project_to": 4})
    ]
    others.append(load_teacher("videomaev2", weights, project_to=4, seed=1).identity())
    for change in ({"seed": 1}, {"dtype": torch.float16}, {"frames": 8}, {"heads": 4}):
        file = write_teacher(tmp_path / f"{change}.pth", "github", **change)
        others.append(load_teacher("videomaev2", str(file)).identity())
    assert not [(a, b) for i, a in enumerate(others) for b in [told[0], *others[:i]] if a == b]
    # The digest is of the tensors that are used: of one block alone, what the second one holds is all the same.
    loaded = torch.load(weights, weights_only=True)
    loaded["model"]["blocks.1.mlp.fc1.weight"] += 1
    torch.save(loaded, tmp_path / "changed.pth")
    for layer, same in ((1, True), (2, False)):
        both = [load_teacher("videomaev2", str(file), layer=layer) for file in (weights, tmp_path / "changed.pth")]
        assert (both[0].identity() == both[1].identity()) is same


def test_upcast(tmp_path):
    file = str(write_teacher(tmp_path, "github"))
    half = load_teacher("videomaev2", file, dtype=torch.bfloat16, pool="all")
    full = load_teacher("videomaev2", file, pool="all")
    assert half.identity() == full.identity()  # the dtype that it runs in belongs to the engine
    assert torch.equal(encoded(half.upcast(), clips_of()), encoded(full, clips_of()))
    assert 0 < relative_error(encoded(half, clips_of()), encoded(full, clips_of())) < 0.05
    write_teacher(file, "github", seed=1)
    with pytest.raises(ValueError, match="its files changed since they were loaded"):
        half.upcast()


# ---- names, and where weights are ------------------------------------------------------------------------


def test_a_name_that_is_not_of_the_weights(weights):
    with pytest.raises(ValueError) as caught:
        load_teacher("videomaev2-base", weights)
    said = str(caught.value)
    assert "--teacher videomaev2-base is of dim 768, depth 12, heads 12, mlp 3072, patch 16, tubelet 2" in said
    assert "are of dim 32, depth 2, heads 2, mlp 128, patch 16, tubelet 2 (none of them)" in said


def test_the_name_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "small", VideoMAESizes(32, 2, 2, 128))
    file = str(write_teacher(tmp_path, "github"))
    assert load_teacher("videomaev2-small", file).clip == CLIP
    with pytest.raises(ValueError, match=r"videomaev2-large is of dim 1024, .*\(videomaev2-small\)"):
        load_teacher("videomaev2-large", file)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("videomaev2-small", None, "is on no hub: download vit_s_k710_dl_from_giant.pth .* --teacher-weights"),
        ("videomaev2", None, "says no size: name one"),
        ("videomaev2-base", "/nowhere/x.pth", r"/nowhere/x.pth: does not exist"),
        ("videomaev2-tiny", None, r"expected one of videomaev2, videomaev2-small, .* got 'videomaev2-tiny'"),
    ],
)
def test_weights_that_are_not_there(name, weights, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_teacher(name, weights)
    assert "http" not in str(caught.value)


def test_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, *, cache_dir, local_files_only, allow_patterns, etag_timeout):
        asked.append((name, local_files_only))
        assert not any(pattern.endswith(".py") for pattern in allow_patterns)  # code is not even downloaded
        if local_files_only:
            raise OSError("not cached")
        return str(write_teacher(tmp_path / "snapshot"))

    class Api:
        def model_info(self, name, timeout):
            pass

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="the weights in .*snapshot are of dim 32"):
        load_teacher("videomaev2-giant")
    assert asked == [("OpenGVLab/VideoMAEv2-giant", True), ("OpenGVLab/VideoMAEv2-giant", False)]
    assert load_teacher("videomaev2", "some-one/a-model").clip == CLIP
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        load_teacher("videomaev2-base")
    assert "the hub, OpenGVLab/VideoMAEv2-Base: not asked, HF_HUB_OFFLINE is set" in str(caught.value)
    looked: list[str] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert from_hub("a/b", looked, files=("x",), missing=lambda folder: "no x") is None
    assert looked[-1] == "the hub, a/b: it has no x"


# ---- engines ---------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    fix_numerics()
    yield
    torch.set_num_threads(before)
    torch.compiler.reset()


def test_eager_engine(tmp_path, weights, one_thread):
    teacher = load_teacher("videomaev2", weights, pool="space")
    engine = open_engine("eager", teacher, shapes=((2, 3, *CLIP),), cache=tmp_path)
    pixels = teacher.prepare(clips_of())
    assert torch.equal(engine.encode(pixels), teacher.encode(pixels))
    assert engine.settings() == engine_settings("eager", torch.device("cpu"), clips=True)
    assert engine.settings()["memory_format"] == "contiguous_format"
    with pytest.raises(ValueError, match=r"expected pixels of shape \(2, 3, 4, 32, 32\); got \(1, 3, 4"):
        engine.encode(pixels[:1])


@pytest.mark.parametrize(
    ("name", "shape", "fuse", "message"),
    [
        ("tensorrt", (2, 3, *CLIP), False, "--engine tensorrt: not for clips; use eager, compile or aoti"),
        ("eager", (2, 3, *CLIP), True, "not for clips with fused norms"),
        ("eager", (2, 3, 32, 32), False, r"expected shapes \(B, 3, T, H, W\), got \(2, 3, 32, 32\)"),
        ("compile", (2, 3, 4, 32, 48), False, "clips of 4 frames of 32×32 only"),
    ],
)
def test_what_cannot_be_opened(tmp_path, weights, name, shape, fuse, message):
    with pytest.raises(ValueError, match=message):
        open_engine(name, load_teacher("videomaev2", weights), shapes=(shape,), cache=tmp_path, fuse=fuse)


def test_an_engine_gets_contiguous_clips(tmp_path, weights, monkeypatch, one_thread):
    teacher = load_teacher("videomaev2", weights)
    seen = []

    def compiled(module, inputs, pool):
        assert isinstance(module, nn.Module) and inputs.shape == (2, 3, *CLIP)
        seen.append(inputs)
        return lambda pixels: seen.append(pixels) or module(pixels)

    monkeypatch.setattr(engine_module, "compile_module", compiled)
    engine = open_engine("compile", teacher, shapes=((2, 3, *CLIP),), cache=tmp_path)
    pixels = teacher.prepare(clips_of())
    other = pixels.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(engine.encode(other), teacher.encode(pixels))
    assert all(one.is_contiguous() for one in seen)
    monkeypatch.setattr(engine_module, "compile_module", lambda module, *_: lambda pixels: module(pixels) * 1.001)
    with pytest.raises(ValueError, match="differs from eager by 0.001"):
        open_engine("compile", teacher, shapes=((2, 3, *CLIP),), cache=tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["compile", "aoti"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_engines(tmp_path, weights, one_thread, name, dtype):
    teacher = load_teacher("videomaev2", weights, dtype=dtype, token_norm="layer", pool="space", project_to=8)
    engine = open_engine(name, teacher, shapes=((2, 3, *CLIP),), cache=tmp_path)
    pixels = teacher.prepare(clips_of())
    got = engine.encode(pixels)
    assert got.shape == (2, 2, 8) and torch.equal(engine.encode(pixels), got)
    assert relative_error(got, teacher.encode(pixels)) < (1e-5 if dtype == torch.float32 else 4e-2)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", ["eager", "compile", "aoti"])
def test_engines_on_cuda(tmp_path, weights, name):
    fix_numerics()
    teacher = load_teacher("videomaev2", weights, "cuda", torch.bfloat16, pool="space")
    want = encoded(load_teacher("videomaev2", weights, pool="space"), clips_of())
    engine = open_engine(name, teacher, shapes=((2, 3, *CLIP),), cache=tmp_path)
    pixels = teacher.prepare(clips_of().cuda())
    assert relative_error(engine.encode(pixels).cpu(), want) < 4e-2
    assert torch.equal(engine.encode(pixels), engine.encode(pixels))


@pytest.mark.parametrize(
    ("device", "clips", "teacher", "want"),
    [
        ("cpu", 10**6, True, ("eager", 4)),
        ("cuda", 1_999, True, ("eager", 32)),
        ("cuda", 2_000, True, ("compile", 32)),
        ("cuda", 10**6, False, ("eager", 1)),
        ("cpu", 1, False, ("eager", 1)),
    ],
)
def test_choose_clip_engine(device, clips, teacher, want):
    assert choose_clip_engine(torch.device(device), clips, teacher)[:2] == want
