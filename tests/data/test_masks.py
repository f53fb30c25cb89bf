"""Masks: exact counts, functions of (seed, epoch, key, config) alone, and what the words of the generator say."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastlatent.data.masks import LONG, SHORT, MaskConfig, complement

GRID = (8, 14, 14)  # 16 frames of 224 x 224 in tubelets of 2 and patches of 16
TUBE, RANDOM = MaskConfig("tube", 0.9), MaskConfig("random", 0.75)
BRIEF = MaskConfig("blocks", 0.5, 0.3, temporal=0.5)  # blocks of 4 of the 8 time steps
NAMES = ["short", "long", "brief", "tube", "random"]
ALL = pytest.mark.parametrize("config", [SHORT, LONG, BRIEF, TUBE, RANDOM], ids=NAMES)
# Keys beside each other and at both ends of the range: none may be rounded.
KEYS = torch.tensor([0, 1, 2, 2**62, 2**62 + 1, -1, -2, -(2**63), 2**63 - 1])


# --- counts ---

shares = st.floats(0.05, 1.0)
configs = st.builds(
    lambda kind, ratio, scale, low, wide, temporal: MaskConfig(kind, ratio, scale, (low, low * wide), temporal),
    st.sampled_from(["blocks", "tube", "random"]), st.floats(0.02, 0.98), shares, st.floats(0.2, 2), st.floats(1, 3),
    shares,
)  # fmt: skip


@given(configs, st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)), st.integers(0, 2**64 - 1))
@example(MaskConfig("blocks", 0.98, 0.05, temporal=0.05), (5, 9, 9), 0)  # many blocks: the words are asked for again
@example(MaskConfig("blocks", 0.5, 1.0), (4, 5, 5), 1)  # one block is everything, half of it is given back
@example(MaskConfig("blocks", 0.5, 0.05, (20.0, 30.0)), (1, 2, 9), 2)  # higher than the grid: cut to it
@settings(max_examples=60)
def test_every_clip_has_the_count_and_each_token_once(config, grid, seed):
    tokens = math.prod(grid)
    try:
        count = config.count(grid)
    except ValueError:
        return  # a ratio that rounds to nothing or all
    masked = config.masked(seed, 3, KEYS, grid)
    assert masked.shape == (len(KEYS), count) and masked.dtype == torch.int64
    assert (masked[:, 1:] > masked[:, :-1]).all() and masked.min() >= 0 and masked.max() < tokens
    assert abs(count - config.ratio * tokens) <= grid[0] / 2  # half a cell in every time step
    visible = config.visible(seed, 3, KEYS, grid)
    both = torch.cat([masked, visible], 1).sort().values
    assert torch.equal(both, torch.arange(tokens).expand(len(KEYS), -1))
    assert (visible[:, 1:] > visible[:, :-1]).all()


def test_counts_of_the_presets():
    """What the union of 8 blocks of 0.15, and of 2 of 0.7, covers on average: integrated over aspects and places."""
    for config, blocks in ((SHORT, 8), (LONG, 2)):
        low, high = config.aspect
        shares = []
        for aspect in np.linspace(low, high, 2001):
            rows, columns = (
                np.array([sum(top <= y < top + size for top in range(15 - size)) / (15 - size) for y in range(14)])
                for size in (min(14, round(math.sqrt(config.scale * 196 * a))) for a in (aspect, 1 / aspect))
            )
            shares.append(1 - ((1 - rows[:, None] * columns) ** blocks).mean())
        assert abs(np.mean(shares) - config.ratio) < 1e-3
    assert SHORT.count(GRID) == 124 * 8 and LONG.count(GRID) == 160 * 8
    assert TUBE.count(GRID) == 176 * 8 and RANDOM.count(GRID) == 1176


# --- what a mask is a function of ---


@ALL
def test_a_mask_depends_on_its_clip_alone(config):
    keys = torch.arange(-40, 40)  # more than are drawn together
    together = config.masked(7, 5, keys, GRID)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert torch.equal(config.masked(7, 5, keys[order], GRID), together[order])
    for i in (0, 31, 32, 79):  # both sides of a chunk's edge
        assert torch.equal(config.masked(7, 5, keys[i : i + 1], GRID)[0], together[i])
    assert torch.equal(config.masked(7, 5, keys.numpy().view(np.uint64), GRID), together)
    assert config.masked(7, 5, keys[:0], GRID).shape == (0, config.count(GRID))


@ALL
def test_seed_epoch_key_number_and_config_are_different_masks(config):
    masks = [
        config.masked(seed, epoch, KEYS, GRID, number=number)
        for seed in (0, 1, 2**64 - 1)
        for epoch in (0, 1)
        for number in (0, 1)
    ]
    if config.kind == "blocks":
        masks += [dataclasses.replace(config, aspect=(0.75, 1.4)).masked(0, 0, KEYS, GRID)]
    distinct = {tuple(row.tolist()) for mask in masks for row in mask}
    # Two blocks on a small grid may agree by chance; a constant may not.
    assert len(distinct) > 0.9 * len(masks) * len(KEYS)
    assert len(distinct) == len(masks) * len(KEYS) or config is LONG


def test_a_config_is_json_and_numbers_of_any_type():
    config = MaskConfig("blocks", 0.5, 1, (1, 2), 1)
    again = MaskConfig(**json.loads(json.dumps(dataclasses.asdict(BRIEF))))
    assert again == BRIEF and again.aspect == (0.75, 1.5)
    other = MaskConfig("blocks", 0.5, 1.0, (1.0, 2.0), 1.0)
    assert torch.equal(config.masked(0, 0, KEYS, GRID), other.masked(0, 0, KEYS, GRID))
    # What a kind does not read is no part of its mask.
    assert torch.equal(TUBE.masked(0, 0, KEYS, GRID), MaskConfig("tube", 0.9, 0.5).masked(0, 0, KEYS, GRID))


# xxh3_64 of the int64 masks of KEYS, seed 1, epoch 2. They come from another process, and must never change: a student
# that goes on training with another release would see other masks.
GOLDEN = {
    "short": (SHORT, GRID, 0, "5ad393011d16d807"),
    "brief": (BRIEF, GRID, 3, "e5c0194244fae044"),
    "tube": (TUBE, (8, 16, 16), 0, "e2e6218bef836286"),
    "random": (RANDOM, (2, 3, 3), 0, "4311dba360cfc34f"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_masks_stay_what_they_are(name):
    config, grid, number, digest = GOLDEN[name]
    masked = config.masked(1, 2, KEYS, grid, number=number).numpy().astype("<i8")
    assert xxhash.xxh3_64_hexdigest(masked.tobytes()) == digest


# --- what the words say ---


def plain_masks(config, seed, epoch, keys, grid, number):
    """One clip after the other, one block after the other, sets of cells: from the description alone."""
    steps, height, width = grid
    fields = {"kind": config.kind, "ratio": config.ratio}
    if config.kind == "blocks":
        fields |= {"scale": config.scale, "aspect": list(config.aspect), "temporal": config.temporal}
    text = json.dumps({"mask": fields, "seed": seed, "number": number}, sort_keys=True, separators=(",", ":"))
    stream = xxhash.xxh3_64_intdigest(text.encode())
    for key in keys.tolist():
        generator = np.random.Philox(
            key=np.array([stream, key % 2**64], np.uint64), counter=np.array([0, 0, 0, epoch], np.uint64)
        )

        def words(count, generator=generator):
            return [int(word) for word in generator.random_raw(count)]

        def order(count, words=words):
            drawn = words(count)
            return sorted(range(count), key=lambda i: (drawn[i] >> 24, i))

        duration = max(1, round(config.temporal * steps))
        alike = config.kind == "tube" or (config.kind == "blocks" and duration == steps)
        times = 1 if alike else steps
        count = round(config.ratio * times * height * width)
        if config.kind != "blocks":
            chosen = order(times * height * width)[:count]
        else:
            cells, moments = order(height * width), order(times)
            low, high = config.aspect
            aspect = low + (words(1)[0] >> 11) / 2**53 * (high - low)
            area, sizes = config.scale * (height * width), []
            for value, most in ((area * aspect, height), (area / aspect, width)):
                sizes.append(min(most, max(1, round(math.sqrt(value)))))
            chosen, length = [], min(duration, times)
            while len(chosen) < count:
                places = zip(words(3), (height, width, times), (*sizes, length), strict=True)
                top, left, first = ((word >> 32) * (most - size + 1) >> 32 for word, most, size in places)
                new = [
                    (step * height + cell // width) * width + cell % width
                    for cell in cells
                    for step in moments
                    if top <= cell // width < top + sizes[0]
                    and left <= cell % width < left + sizes[1]
                    and first <= step < first + length
                ]
                taken = set(chosen)
                chosen += [token for token in new if token not in taken]
            chosen = chosen[:count]
        yield sorted(copy * height * width + token for copy in range(steps if alike else 1) for token in chosen)


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (SHORT, GRID),
        (LONG, (2, 5, 7)),
        (BRIEF, (5, 6, 4)),
        (MaskConfig("blocks", 0.9, 0.1, (0.5, 3.0), 0.2), (6, 5, 5)),  # words are asked for again
        (TUBE, (3, 6, 5)),
        (RANDOM, (3, 6, 5)),
    ],
)
def test_masks_are_what_the_description_says(config, grid):
    want = list(plain_masks(config, 5, 9, KEYS, grid, 2))
    assert config.masked(5, 9, KEYS, grid, number=2).tolist() == want


@pytest.mark.parametrize("config", [SHORT, LONG, TUBE])
def test_every_time_step_has_the_same_mask(config):
    masked = config.masked(0, 0, KEYS, GRID).reshape(len(KEYS), 8, -1)
    assert torch.equal(masked - 196 * torch.arange(8)[:, None], masked[:, :1].expand_as(masked))


def frequencies(config, grid, clips):
    """How often each token is masked, [t, h, w]."""
    masked = config.masked(0, 0, torch.arange(clips), grid)
    return np.bincount(masked.flatten().numpy(), minlength=math.prod(grid)).reshape(grid) / clips


def test_single_tokens_are_masked_equally_often():
    # 4000 clips: five standard deviations of a token are 5 sqrt(0.25 * 0.75 / 4000) = 0.034.
    found = frequencies(RANDOM, (4, 3, 3), 4000)
    assert abs(found - 27 / 36).max() < 0.034


def test_late_frames_are_masked_as_often_as_early_ones():
    """Blocks of 2 of 4 steps lie less often at the ends, but equally often at both; so do rows and columns."""
    config = MaskConfig("blocks", 0.5, 0.3, temporal=0.5)
    found = frequencies(config, (4, 6, 6), 4000)
    # A time step's share of 4000 clips varies by less than 0.2 between clips: five standard deviations are 0.016.
    for axis in range(3):
        shares = found.mean(tuple({0, 1, 2} - {axis}))
        assert abs(shares - shares[::-1]).max() < 0.023  # of a difference: sqrt(2) times as much
    assert found.mean((1, 2))[1] > found.mean((1, 2))[0] + 0.05


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cells"}, "expected one of blocks, tube, random, got 'cells'"),
        ({"ratio": 0}, "mask ratio: expected a share between 0 and 1, got 0"),
        ({"ratio": float("nan")}, "got nan"),
        ({"scale": 1.5}, "mask scale: expected a share above 0, at most 1, got 1.5"),
        ({"temporal": 0}, "mask temporal"),
        ({"aspect": (1.5, 0.75)}, r"mask aspect: .* got \(1.5, 0.75\)"),
    ],
)
def test_configs_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**{"kind": "blocks", "ratio": 0.5, **arguments})


def test_masks_that_are_none():
    with pytest.raises(ValueError, match=r"ratio 0.9 of a grid \(8, 2, 2\): expected it to mask 1 to 31 .* got 32"):
        TUBE.masked(0, 0, KEYS, (8, 2, 2))
    with pytest.raises(ValueError, match="tokens, got 0; choose"):
        MaskConfig("random", 0.1).count((1, 2, 2))
    with pytest.raises(ValueError, match=r"expected a grid .* got \(8, 14\)"):
        TUBE.count((8, 14))
    with pytest.raises(ValueError, match="mask seed: expected 0 to 2.64 - 1, got -1"):
        TUBE.masked(-1, 0, KEYS, GRID)
    with pytest.raises(ValueError, match="mask epoch"):
        TUBE.masked(0, 2**64, KEYS, GRID)
    with pytest.raises(ValueError, match=r"expected int64 \[B\], got float32 \[9\]"):
        TUBE.masked(0, 0, KEYS.float(), GRID)


def test_complement():
    assert complement(torch.tensor([[1, 2], [0, 3]]), 4).tolist() == [[0, 3], [1, 2]]


def test_one_token_cannot_be_masked():
    with pytest.raises(ValueError, match=r"grid \(1, 1, 1\) is one token, as of --pool all"):
        LONG.count((1, 1, 1))  # no other ratio would do, either
