"""Streamed decodes against diffusers' own `decode`, bit for bit; what they hold; the compiled step."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_video_models import TINY, VARIANTS, make_vae
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlatent.encoders.video_streaming import STREAMS, TIMES, UNTILED, WHOLE, stream_wan, wan_step

# Published Cosmos models have no attention above the middle block.
COSMOS = {"attention_resolutions": ()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def get(name: str, **changes: Any) -> Any:
        key = f"{name} {changes}"
        if key not in made:
            folder = make_vae(name, tmp_path_factory.mktemp("vae"), **changes)
            kind = VARIANTS[name][0] if name in VARIANTS else name
            made[key] = getattr(diffusers, kind).from_pretrained(folder).eval()
            if kind == "AutoencoderKLAllegro":  # the published overlaps are larger than a tiny tile
                made[key].kernel, made[key].stride = (24, 32, 32), (16, 16, 24)
        return made[key]

    return get


def latents(model: Any, t: int, h: int = 3, w: int = 4) -> Tensor:
    channels = model.config.get("z_dim") or model.config["latent_channels"]
    return torch.randn(1, channels, t, h, w, generator=torch.Generator().manual_seed(t))


def whole(model: Any, z: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(model, diffusers.AutoencoderKLTemporalDecoder):
            parts = [model.decode(p, num_frames=len(p), return_dict=False)[0] for p in z[0].transpose(0, 1).split(14)]
            return torch.cat(parts).transpose(0, 1)[None]
        if isinstance(model, diffusers.AutoencoderKLAllegro):
            model.use_tiling = True
            return model.decode(z, return_dict=False)[0].transpose(1, 2)
        return model.decode(z, return_dict=False)[0]


def streamed(model: Any, z: Tensor, **options: Any) -> Any:
    return STREAMS[type(model).__name__](model, z, **options)


# name, latent frames, frames of each chunk. 1: no second chunk. 2: nothing steady yet. 3: the first steady one.
CASES: list[tuple[str, int, list[int]]] = [
    *[(name, t, [1] + [4] * (t - 1)) for name in ("AutoencoderKLWan", "Wan2.2") for t in (1, 2, 3, 5)],
    ("AutoencoderKLCogVideoX", 1, [1]),
    ("AutoencoderKLCogVideoX", 2, [8]),  # an even number: no first frame alone, as diffusers has it
    ("AutoencoderKLCogVideoX", 3, [9]),
    ("AutoencoderKLCogVideoX", 5, [9, 8]),
    ("AutoencoderKLHunyuanVideo", 1, [1]),
    ("AutoencoderKLHunyuanVideo", 3, [9]),
    ("AutoencoderKLHunyuanVideo", 4, [13]),  # the last number that diffusers decodes in one piece
    ("AutoencoderKLHunyuanVideo", 5, [13, 4]),
    ("AutoencoderKLHunyuanVideo", 7, [13, 12]),  # a third piece of one latent frame, which adds nothing
    ("AutoencoderKLHunyuanVideo", 8, [13, 12, 4]),  # blended with a piece that was blended
    ("AutoencoderKLTemporalDecoder", 1, [1]),
    ("AutoencoderKLTemporalDecoder", 5, [5]),
    ("AutoencoderKLTemporalDecoder", 15, [14, 1]),  # one more than a group
    *[(name, t, [f]) for name, f in (("AutoencoderKLMochi", 13), ("AutoencoderKLCosmos", 17)) for t in (3,)],
    ("AutoencoderKLHunyuanVideo15", 3, [9]),
    ("AutoencoderKLLTXVideo", 3, [17]),
]


@pytest.mark.parametrize(("name", "t", "chunks"), CASES)
def test_chunks_joined_are_what_diffusers_decodes(models: Any, name: str, t: int, chunks: list[int]) -> None:
    model = models(name)
    z = latents(model, t)
    parts = list(streamed(model, z))
    assert [part.shape[2] for part in parts] == chunks
    assert torch.equal(torch.cat(parts, 2), whole(model, z))


# 6: one piece of time. 10: two, which overlap. 4×4: one tile. 6×7: two tiles each way, one of which overlaps by half.
@pytest.mark.parametrize(("t", "h", "w", "chunks"), [(6, 4, 4, [24]), (10, 6, 7, [16, 24])])
def test_allegro_is_summed_up_in_the_order_of_diffusers(models: Any, t: int, h: int, w: int, chunks: list[int]) -> None:
    model = models("AutoencoderKLAllegro")
    z = latents(model, t, h, w)
    parts = list(streamed(model, z))
    assert [part.shape[2] for part in parts] == chunks
    assert torch.equal(torch.cat(parts, 2), whole(model, z))


@pytest.mark.parametrize("t", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("name", "changes", "frames"),
    [
        ("AutoencoderKLMochi", {}, 6),
        ("AutoencoderKLHunyuanVideo15", {}, 4),
        ("AutoencoderKLCosmos", COSMOS, 8),
        ("AutoencoderKLCosmos", COSMOS | {"patch_type": "rearrange"}, 8),
        ("AutoencoderKLCosmos", {}, 8),  # attention in the last block: only the output convolution has a cache
    ],
)
def test_own_cache_goes_on_where_the_last_chunk_ended(
    models: Any, name: str, changes: dict[str, Any], frames: int, t: int
) -> None:
    # In float64, because convolutions of 3 and of 20 frames are rounded differently (torch chooses by size).
    model = copy.deepcopy(models(name, **changes)).double()
    z = latents(model, t, 2, 2).double()
    parts = list(streamed(model, z, tiles=True))
    assert [part.shape[2] for part in parts] == [1] + [frames] * (t - 1)
    torch.testing.assert_close(torch.cat(parts, 2), whole(model, z), rtol=0, atol=1e-12)


FRAMEWISE = ("AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo")  # pieces of time in diffusers, when tiled
TILES: dict[str, dict[str, Any]] = {
    # 32×32 pixels at a stride of 16 or 24: tiles of 4×4 (Wan 2.2, Hunyuan 1.5: 2×2) latents, the last ones cut.
    "AutoencoderKLWan": {"tile_sample_min_height": 32, "tile_sample_min_width": 32},
    "Wan2.2": {"tile_sample_min_height": 64, "tile_sample_min_width": 64},
    "AutoencoderKLMochi": {"tile_sample_min_height": 32, "tile_sample_min_width": 32},
    "AutoencoderKLHunyuanVideo": {"tile_sample_min_height": 32, "tile_sample_min_width": 32},
    "AutoencoderKLCogVideoX": {
        "tile_sample_min_height": 32, "tile_sample_min_width": 32,
        "tile_overlap_factor_height": 0.25, "tile_overlap_factor_width": 0.25,
    },
    "AutoencoderKLHunyuanVideo15": {
        "tile_sample_min_height": 64, "tile_sample_min_width": 64,
        "tile_latent_min_height": 4, "tile_latent_min_width": 4,
    },
    "AutoencoderKLLTXVideo": {"tile_sample_min_height": 64, "tile_sample_min_width": 64},
}  # fmt: skip
STRIDED = {32: {"tile_sample_stride_height": 16, "tile_sample_stride_width": 24}}
STRIDED[64] = {"tile_sample_stride_height": 32, "tile_sample_stride_width": 48}


@pytest.mark.parametrize("name", TILES)
def test_tiles_are_those_of_diffusers(models: Any, name: str) -> None:
    # 4×6 latents: two rows and two columns of tiles, the last ones smaller. LTX is 32 pixels a latent: tiles of 2×2.
    h, w = (2, 3) if name == "AutoencoderKLLTXVideo" else (4, 6)
    # 5: Hunyuan and LTX have several pieces of time too. 4: two chunks of CogVideoX. 2: enough for one with a cache.
    model = models(name, seed=1)
    z = latents(model, 5 if name in FRAMEWISE else 4 if name == "AutoencoderKLCogVideoX" else 2, h, w)
    if name in WHOLE:  # own caches: see above
        model, z = model.double(), z.double()
    untiled = whole(model, z)
    strides = {} if any("overlap" in key for key in vars(model)) else STRIDED[TILES[name]["tile_sample_min_height"]]
    model.enable_tiling(**TILES[name], **strides)
    framewise, model.use_framewise_decoding = getattr(model, "use_framewise_decoding", False), name in FRAMEWISE
    tiled = whole(model, z)
    model.use_tiling, model.use_framewise_decoding = False, framewise  # `tiles` alone decides
    parts = list(streamed(model, z, tiles=True))
    assert len(parts) > 1
    assert not model.use_tiling
    assert (tiled - untiled).abs().max() > 1e-3
    torch.testing.assert_close(torch.cat(parts, 2), tiled, rtol=0, atol=1e-12 if name in WHOLE else 0)


def test_what_has_no_tiles_says_so(models: Any) -> None:
    assert {"AutoencoderKLTemporalDecoder"} == UNTILED
    model = models("AutoencoderKLTemporalDecoder")
    with pytest.raises(ValueError, match=r"cannot be decoded in tiles.*bfloat16"):
        next(streamed(model, latents(model, 2), tiles=True))


def test_every_class_is_named() -> None:
    assert set(STREAMS) == set(TIMES) == set(TINY)
    assert {name for name, how in TIMES.items() if how.startswith("whole")} == WHOLE


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKLMochi"])
def test_an_iterator_may_be_left_and_the_model_used_between_chunks(models: Any, name: str) -> None:
    model = models(name)
    z, other = latents(model, 5), latents(model, 2)
    expected, between = whole(model, z), whole(model, other)
    chunks = streamed(model, z, tiles=True)
    next(chunks)
    assert torch.equal(whole(model, other), between)
    next(chunks)
    chunks.close()
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(whole(model, z), expected)
    # A failure inside a chunk (out of memory) leaves the modules as they were, too.
    chunks = streamed(model, z, tiles=True)
    next(chunks)
    handle = next(iter(model.decoder.children())).register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(chunks)
    handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(whole(model, z), expected)


class Alive(TorchDispatchMode):
    """The most bytes of storages alive at once, among those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outside = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in self.known | outside:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _peak(model: Any, t: int, tiles: bool | None) -> tuple[int, int]:
    """Peak bytes of decoding, and bytes that are left after the iterator. tiles None: diffusers' decode."""
    z = latents(model, t, 2, 2)
    with torch.no_grad(), Alive() as alive:
        if tiles is None:
            whole(model, z)
        else:
            deque(streamed(model, z, tiles=tiles), maxlen=0)
            gc.collect()
    return alive.peak, alive.now


SOAK = pytest.mark.soak


# CogVideoX: odd numbers, with which its first chunk is larger. 16 and 61: 61 and 241 frames of Wan.
@pytest.mark.parametrize(
    ("name", "short", "long", "tiles"),
    [
        ("AutoencoderKLWan", 3, 5, False),
        ("AutoencoderKLMochi", 2, 4, True),
        pytest.param("AutoencoderKLCogVideoX", 5, 7, False, marks=SOAK),
        pytest.param("AutoencoderKLHunyuanVideo", 8, 11, False, marks=SOAK),
        pytest.param("AutoencoderKLWan", 16, 61, False, marks=SOAK),
        pytest.param("Wan2.2", 16, 61, False, marks=SOAK),
        pytest.param("AutoencoderKLCogVideoX", 13, 61, False, marks=SOAK),
        pytest.param("AutoencoderKLHunyuanVideo", 16, 61, False, marks=SOAK),
        pytest.param("AutoencoderKLMochi", 16, 61, True, marks=SOAK),
        pytest.param("AutoencoderKLLTXVideo", 16, 61, True, marks=SOAK),
        pytest.param("AutoencoderKLTemporalDecoder", 28, 61, False, marks=SOAK),
        pytest.param("AutoencoderKLAllegro", 14, 62, False, marks=SOAK),
    ],
)
def test_memory_does_not_grow_with_time(
    models: Any, monkeypatch: pytest.MonkeyPatch, name: str, short: int, long: int, tiles: bool
) -> None:
    assert tiles or name not in WHOLE
    if tiles:  # one tile in space, so that no frames wait on the host
        monkeypatch.setattr("fastlatent.encoders.video_streaming.grid_of", lambda *_: None)
    model = models(name)
    (little, rest), (much, _) = _peak(model, short, tiles), _peak(model, long, tiles)
    assert rest == 0
    assert much <= 1.05 * little
    if long >= 61 and name in ("AutoencoderKLMochi", "AutoencoderKLLTXVideo"):
        assert _peak(model, long, None)[0] > 3 * much


def test_held_caches_go_with_the_iterator(models: Any) -> None:
    model = models("AutoencoderKLWan")
    with torch.no_grad(), Alive() as alive:
        chunks = streamed(model, latents(model, 5))
        next(chunks)
        next(chunks)
        assert alive.now > 0
        chunks.close()
        del chunks
        gc.collect()
        assert alive.now == 0


def test_a_step_takes_the_place_of_the_steady_chunks(models: Any) -> None:
    model = models("Wan2.2")
    z, calls = latents(model, 5), []
    step = wan_step(model)

    def spy(frame: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        calls.append([tuple(cache.shape) for cache in caches])
        return step(frame, caches)

    assert torch.equal(torch.cat(list(stream_wan(model, z, step=spy)), 2), whole(model, z))
    assert len(calls) == 3 and calls[0] == calls[1] == calls[2]  # one shape: one graph
    assert {shape[2] for shape in calls[0]} == {2}


@pytest.mark.soak
@pytest.mark.parametrize("name", ["AutoencoderKLWan", "Wan2.2"])
def test_compiled_step(models: Any, name: str) -> None:
    model = models(name)
    z = latents(model, 5)
    torch.compiler.reset()  # other tests compile the same code for other sizes, and Dynamo allows 8
    step = torch.compile(wan_step(model), fullgraph=True)
    out = torch.cat(list(stream_wan(model, z, step=step)), 2)
    torch.testing.assert_close(out, whole(model, z), rtol=0, atol=1e-5)


@pytest.mark.soak
def test_packaged_step(models: Any, tmp_path: Path) -> None:
    model = models("AutoencoderKLWan")
    z, seen = latents(model, 5), []
    step = wan_step(model)

    def spy(frame: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        seen.append((frame.clone(), [cache.clone() for cache in caches]))
        return step(frame, caches)

    list(stream_wan(model, z, step=spy))
    with torch.no_grad():
        program = torch.export.export(step, seen[0])
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    out = torch.cat(list(stream_wan(model, z, step=torch._inductor.aoti_load_package(package))), 2)
    torch.testing.assert_close(out, whole(model, z), rtol=0, atol=1e-5)
