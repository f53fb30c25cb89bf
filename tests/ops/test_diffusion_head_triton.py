"""The Triton kernels of diffusion_head_sample themselves, on any machine: interpreted where there is no GPU."""

import dataclasses

import pytest
import torch

from fastlatent.ops.diffusion_head_sample import HeadWeights, diffusion_head_sample_reference, modulation_chunks
from fastlatent.ops.solver_step import BASE, ROW, R

pytest.importorskip("triton")
from fastlatent.kernels import diffusion_head_sample as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Case:
    ways: int = 2
    batch: int = 1
    hidden: int = 48
    width: int = 80
    channels: int = 16
    blocks: int = 1
    steps: int = 2
    gated: bool = True
    layer_norm: bool = False
    learned: bool = False
    noise: bool = False
    int8: bool = False


CASES = {
    "defaults": Case(),
    "1 row": Case(ways=1),
    "3 ways": Case(ways=3),
    "16 rows": Case(batch=8, noise=True),  # the most that fit a product of 16 columns
    "17 rows": Case(ways=1, batch=17, layer_norm=True),  # one more: 32 columns
    "32 rows": Case(batch=16, blocks=3, steps=1),  # the most rows
    "5 ways, 30 rows": Case(ways=5, batch=6),  # padded ways
    "3 blocks": Case(blocks=3, noise=True),
    "32 channels": Case(channels=32, batch=2, noise=True),  # two programs share a sample
    "64 channels": Case(channels=64, layer_norm=True, steps=3),
    "19 channels": Case(channels=19, batch=2, learned=True, noise=True),  # the second program has 3
    "3 channels": Case(channels=3, hidden=32, width=32),
    "MAR": Case(hidden=80, width=80, gated=False, layer_norm=True, learned=True, noise=True, blocks=3),
    "ungated": Case(gated=False, hidden=64, width=128),
    "odd sizes": Case(hidden=33, width=47, batch=3),  # every tile is padded
    "long rows": Case(
        ways=1, batch=17, hidden=272, width=16, gated=False, layer_norm=True, steps=1
    ),  # statistics in two tiles
    "int8": Case(int8=True, batch=2),
    "int8 ungated": Case(int8=True, gated=False, blocks=2, layer_norm=True),
}


def inputs(case, dtype, seed=0):
    """(state, condition, t_embedding, table, guidance, weights, noise); r = 1.5 clips about a third of the data."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width, channels, blocks = case.hidden, case.width, case.channels, case.blocks
    up, out, parts = width * (1 + case.gated), channels * (1 + case.learned), 3 * blocks + 2

    def draw(*size, factor=1.0, kind=torch.float32):
        values = torch.randn(size, generator=generator, dtype=torch.float64) * factor
        return values.to(DEVICE, kind)

    def weight(*size):
        return draw(*size, factor=size[-1] ** -0.5, kind=dtype)

    ups, downs, up_scale, down_scale = weight(blocks, up, hidden), weight(blocks, hidden, width), None, None
    if case.int8:
        up_scale, down_scale = (w.float().abs().amax(-1) / 127 for w in (ups, downs))
        ups, downs = (
            (w.float() / s[..., None]).round().to(torch.int8) for w, s in ((ups, up_scale), (downs, down_scale))
        )
    weights = HeadWeights(
        weight(hidden, channels), draw(hidden), weight(parts * hidden, hidden), draw(parts * hidden), ups,
        draw(blocks, up), downs, draw(blocks, hidden), weight(out, hidden), draw(out), up_scale, down_scale,
        layer_norm=case.layer_norm, eps=1e-5,
    )  # fmt: skip
    table = draw(case.steps, ROW, factor=0.5)
    table[:, R] = 1.5
    table[:, BASE] = torch.arange(case.steps) % 2
    return (
        draw(4, case.batch, channels), draw(case.ways, case.batch, hidden, kind=dtype),
        draw(case.steps, hidden, kind=dtype), table, draw(case.ways, case.batch), weights,
        draw(case.steps, case.batch, channels) if case.noise else None,
    )  # fmt: skip


def run_triton(state, condition, t_embedding, table, guidance, weights, noise):
    state = state.clone()
    ((_, modulations),) = modulation_chunks(condition, t_embedding, weights)
    _, _, _, _, *body = weights.tensors()
    kernels.head_steps_triton(
        state, modulations, table, guidance, noise, weights.input_weight, weights.input_bias, *body,
        weights.layer_norm, weights.eps,
    )  # fmt: skip
    return state


def run_reference(state, *rest):
    state = state.clone()
    diffusion_head_sample_reference(state, *rest)
    return state


def doubled(state, condition, t_embedding, table, guidance, weights, noise):
    def double(value):
        return value.double() if isinstance(value, torch.Tensor) and value.dtype != torch.int8 else value

    fields = {field.name: double(getattr(weights, field.name)) for field in dataclasses.fields(weights)}
    return (*map(double, (state, condition, t_embedding, table, guidance)), HeadWeights(**fields), double(noise))


def error(got, exact):
    """Relative Frobenius error."""
    return float((got.double() - exact).norm() / exact.norm())


def assert_as_good_as_torch(got, arguments):
    exact, dtype = run_reference(*doubled(*arguments)), arguments[5].dtype
    # A rounding of the result where few elements let torch be exact by luck.
    limit = max(1.5 * error(run_reference(*arguments), exact), torch.finfo(dtype).eps)
    assert error(got, exact) <= limit
    if dtype == torch.float32:
        assert error(got, exact) < 1e-5


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs them one after another: few, but still more than one a tile."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "PROGRAMS", 3)


ROUNDED = ("1 row", "17 rows", "3 blocks", "19 channels", "MAR", "int8")


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in CASES]
    + [(name, torch.bfloat16) for name in ROUNDED]
    + [pytest.param(name, torch.bfloat16, marks=pytest.mark.soak) for name in CASES if name not in ROUNDED]
    + [pytest.param(name, torch.float16, marks=() if name == "defaults" else pytest.mark.soak) for name in CASES],
)
def test_no_less_accurate_than_torch(name, dtype):
    if DEVICE == "cpu":
        assert type(kernels.up_kernel).__name__ == "InterpretedFunction"
    arguments = inputs(CASES[name], dtype)
    assert_as_good_as_torch(run_triton(*arguments), arguments)


# 1: no split, and 64 rows of weights a tile. 2: two parts. 128: a part for each tile of the sum, 16 rows a tile.
SPLITS = [(1, 1, 64), (2, 2, 64), (3, 3, 64), (128, 5, 16)]


@pytest.mark.parametrize(
    "programs, splits, block_n, gated",
    [(*split, True) for split in SPLITS]
    + [
        (*split, False) if split == SPLITS[2] else pytest.param(*split, False, marks=pytest.mark.soak)
        for split in SPLITS
    ],
)
def test_split_sums_and_tiles(programs, splits, block_n, gated, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    case = Case(width=272, gated=gated, blocks=2, steps=1)
    assert kernels.down_constants(case.hidden, case.width, 2, 2)["SPLITS"] == splits
    assert kernels.up_constants(case.hidden, case.width, gated, 2, 2)["BLOCK_N"] == block_n
    arguments = inputs(case, torch.bfloat16)
    assert_as_good_as_torch(run_triton(*arguments), arguments)


def test_tail_in_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "TAIL_HIDDEN", 32)
    arguments = inputs(Case(hidden=80, channels=24, learned=True, noise=True), torch.float32)
    assert_as_good_as_torch(run_triton(*arguments), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_every_run(dtype):
    arguments = inputs(Case(batch=3, channels=32, blocks=2, noise=True), dtype)
    first = run_triton(*arguments)
    for _ in range(20 if DEVICE == "cuda" else 1):
        assert torch.equal(run_triton(*arguments), first)


@pytest.mark.parametrize("case", [Case(), Case(channels=40, blocks=2, batch=2)])
def test_reads_nothing_it_has_not_written(case, monkeypatch):
    """Workspace full of NaN; and the counters are at zero again."""
    arguments = inputs(case, torch.float32)
    want, counters = run_triton(*arguments), []
    new_empty, zeros = torch.Tensor.new_empty, torch.zeros

    def poisoned(self, *size, **options):
        empty = new_empty(self, *size, **options)
        return empty.fill_(torch.nan) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(
        torch, "zeros", lambda *size, **options: counters.append(zeros(*size, **options)) or counters[-1]
    )
    assert torch.equal(run_triton(*arguments), want)
    assert len(counters) == 1 and not counters[0].any()


@pytest.mark.parametrize("blocks", [1, 3])
def test_launches(blocks, monkeypatch):
    """2L + 1 a step, and the first input projection; every kernel of a step in one order."""
    launched = []

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            def launch(*args, **options):
                launched.append(self.name.removesuffix("_kernel"))
                # Only the first may not start early: what it follows can have written weights.
                assert options.get("launch_pdl", False) == (options["PDL"] and len(launched) > 1)
                return self.kernel[grid](*args, **options)

            return launch

    for name in ("up_kernel", "down_kernel", "tail_kernel"):
        monkeypatch.setattr(kernels, name, Counted(name))
    run_triton(*inputs(Case(blocks=blocks, steps=2), torch.float32))
    assert launched == ["tail"] + 2 * (blocks * ["up", "down"] + ["tail"])


def test_nan_shows_and_stays_in_its_sample():
    arguments = inputs(Case(batch=3), torch.float32)
    want = run_triton(*arguments)
    arguments[0][0, 1, 5] = torch.nan
    got = run_triton(*arguments)
    assert got[0, 1].isnan().all()
    assert torch.equal(got[:, [0, 2]], want[:, [0, 2]])


def test_empty_batch():
    case = Case(batch=0)
    assert run_triton(*inputs(case, torch.float32)).shape == (4, 0, case.channels)


def test_other_uses_are_programming_errors():
    with pytest.raises(AssertionError):
        run_triton(*inputs(Case(ways=3, batch=11), torch.float32))  # 33 rows
    with pytest.raises(AssertionError):
        run_triton(*doubled(*inputs(Case(), torch.float32)))


def test_compiles_for_hopper(hopper):
    """Ahead of time and without a GPU: tensor cores at 16 columns, and weights that are loaded before the wait."""
    names = [f"{part} latentlm-medium bf16 rows 16" for part in ("up_kernel", "down_kernel", "tail_kernel")]
    for name, row in zip(names, hopper("diffusion_head_sample", *names), strict=True):
        assert row["spilled"] == 0, name
        assert row["shared"] <= 99 * 1024, name  # what sm_86, sm_89 and sm_120 have
        before, after = row["sass_text"].split("ACQBULK")  # the wait for the kernel before
        assert before.count("LDG.E") >= 2 and "PREEXIT" in after, name
        assert (row["sass"]["HGMMA"] > 0) == row["wgmma"] == (name != names[-1]), name
