"""The engine against the plain re-computation in tests/plain, in float64."""

import copy

import plain_latentlm
import pytest
import torch

from fastlatent.diffusion.solvers import build_table
from fastlatent.models.transformer import Transformer, TransformerConfig
from fastlatent.sampling.autoregressive import NextTokenSampler

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
# 2 key and value heads for 4 query heads: grouped-query attention; 9 tokens: more than one row of the grid.
CONFIG = TransformerConfig(
    hidden_size=64, depth=2, num_heads=4, num_kv_heads=2, mlp_ratio=3, diffusion_depth=2,
    in_channels=3, input_size=3, num_classes=5,
)  # fmt: skip
LABELS = torch.tensor([0, 4, 2])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(CONFIG).double().eval().requires_grad_(False)
    # Modulations and output start at zero, which would hide every error in them.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def engine(model, prediction_type="v_prediction", steps=6, cfg_scale=2.5, solver=None, **options):
    solver = solver or ("euler" if prediction_type == "flow" else "dpmsolver++")
    return NextTokenSampler(
        model, build_table(solver, steps, prediction_type, "cosine"), cfg_scale=cfg_scale, **options
    )


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("device", DEVICES)
def test_backbone_equals_plain(model, noise, device):
    state, sizes = model.state_dict(), vars(CONFIG)
    want = plain_latentlm.conditions(state, sizes, noise[:, :-1], LABELS)
    model = model.to(device)
    got = model.condition(noise.to(device), LABELS.to(device)).cpu()
    cache = model.new_cache(3)
    h, stepped = model.y_embedder(LABELS.to(device)), []
    for i in range(CONFIG.num_tokens):
        stepped.append(model.step(h, i, cache))
        h = model.x_embedder(noise[:, i].to(device))
    model.to("cpu")
    assert error(got, want) <= 1e-10
    assert error(torch.stack(stepped, 1).cpu(), want) <= 1e-10


@pytest.mark.parametrize("device", DEVICES)
def test_head_equals_plain(model, noise, device):
    condition = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = torch.stack(
        [plain_latentlm.head(model.state_dict(), vars(CONFIG), noise[:, 0], t, condition) for t in (0, 500, 999)]
    )
    t = torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64)[:, None].expand(3, 3).to(device)
    model = model.to(device)
    got = model.denoise(noise[:, 0].to(device).expand(3, 3, 3), t, condition.to(device).expand(3, 3, 64)).cpu()
    model.to("cpu")
    assert error(got, want) <= 1e-10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 6])  # 1: first and last at once; 2: no second-order step; 6: some
def test_whole_grid_equals_plain(model, noise, prediction_type, steps, device):
    want = plain_latentlm.sample(
        model.state_dict(),
        vars(CONFIG),
        LABELS,
        noise,
        prediction_type=prediction_type,
        steps=steps,
        cfg_scale=2.5,
    )
    got = engine(model.to(device), prediction_type, steps).sample(LABELS, noise).cpu()
    model.to("cpu")
    assert error(got, want) <= 1e-10


def test_guidance_of_one_is_the_conditional_model(model, noise):
    want = plain_latentlm.sample(
        model.state_dict(),
        vars(CONFIG),
        LABELS,
        noise,
        prediction_type="v_prediction",
        steps=3,
        cfg_scale=1.0,
    )
    sampler = engine(model, steps=3, cfg_scale=1.0)
    assert sampler.ways == 1
    assert error(sampler.sample(LABELS, noise), want) <= 1e-10


def test_small_workspace_changes_nothing(model, noise, monkeypatch):
    want = engine(model).sample(LABELS, noise)
    monkeypatch.setattr("fastlatent.sampling.autoregressive.WORKSPACE_BYTES", 1)  # one step at a time
    assert error(engine(model).sample(LABELS, noise), want) <= 1e-10  # another GEMM shape, other last bits


@pytest.mark.parametrize("solver", ["dpmsolver++", "ddpm"])
def test_rows_do_not_depend_on_their_batch(model, noise, solver):
    # ddpm adds noise at every step, drawn for (seed, sample, token) whatever batch the sample is in.
    sampler = engine(model, solver=solver)
    together = sampler.sample(LABELS, noise, seed=7)
    apart = torch.cat([sampler.sample(LABELS[i : i + 1], noise[i : i + 1], seed=7, first_id=i) for i in range(3)])
    assert error(apart, together) <= 1e-10
    if solver == "ddpm":
        assert error(sampler.sample(LABELS, noise, seed=8), together) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_no_worse_than_plain_torch(model, noise, dtype):
    want = engine(model).sample(LABELS, noise)
    ours = copy.deepcopy(model).to(dtype)
    got = engine(ours).sample(LABELS, noise)
    plain = plain_latentlm.sample(
        ours.state_dict(),
        vars(CONFIG),
        LABELS,
        noise.to(dtype),
        prediction_type="v_prediction",
        steps=6,
        cfg_scale=2.5,
    )
    assert got.dtype == torch.float32
    assert error(got.double(), want) <= 1.5 * error(plain.double(), want)


def test_compiled_equals_eager(model, noise):
    want = engine(model, steps=2).sample(LABELS, noise)
    assert error(engine(model, steps=2, compile=True).sample(LABELS, noise), want) <= 1e-10


@pytest.mark.parametrize(
    ("labels", "shape", "message"),
    [
        ([0, 1], (2, 9, 4), r"noise: expected \[2, 9, 3\]"),
        ([0, 1], (3, 9, 3), r"noise: expected \[2, 9, 3\]"),
        ([0, 5], (2, 9, 3), "labels: expected 0 to 4"),
        ([-1, 0], (2, 9, 3), "labels: expected 0 to 4"),
    ],
)
def test_bad_input(model, labels, shape, message):
    with pytest.raises(ValueError, match=message):
        engine(model).sample(torch.tensor(labels), torch.zeros(shape))


def test_no_sequences(model):
    assert engine(model).sample(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 9, 3)).shape == (0, 9, 3)
