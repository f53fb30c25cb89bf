"""The engine against the plain re-computation in tests/plain, in float64."""

import copy
import sys

import plain_latentlm
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlatent.diffusion.annealing import annealed_steps, guidance_scales
from fastlatent.diffusion.solvers import build_table
from fastlatent.models.transformer import Transformer, TransformerConfig
from fastlatent.sampling.attention import KVCache, choose_attention
from fastlatent.sampling.autoregressive import NextTokenSampler
from fastlatent.sampling.backbone import Backbone

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
    backbone, attention = Backbone(model), choose_attention(torch.device(device), torch.float64, 16, torch.float64)
    cache = KVCache.allocate(2, 3, 9, 2, 16, kv_dtype=torch.float64, device=device)
    h, stepped = model.y_embedder(LABELS.to(device)), []
    for i in range(CONFIG.num_tokens):
        position = torch.tensor([i], device=device)

        def attend(layer, qkv, i=i, position=position):
            keys, values = cache.keys[layer], cache.values[layer]
            return attention.run(qkv, backbone.cos, backbone.sin, position, i + 1, keys, values)

        stepped.append(backbone.step(h, attend))
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
    monkeypatch.setattr(sys.modules["fastlatent.ops.diffusion_head_sample"], "WORKSPACE_BYTES", 1)  # one step at a time
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


def test_steps_and_guidance_may_vary_from_token_to_token(model, noise):
    """DiSA's annealing of the steps, and MAR's growing guidance."""
    steps = annealed_steps(6, 2, 9)
    scales = guidance_scales(2.5, 9, "linear").tolist()
    assert steps[0] == 6 and steps[-1] == 2 and scales[-1] == 2.5 and scales[0] < 1.2
    want = plain_latentlm.sample(
        model.state_dict(), vars(CONFIG), LABELS, noise, prediction_type="v_prediction", steps=steps, cfg_scale=scales
    )
    tables = {n: build_table("dpmsolver++", n, "v_prediction", "cosine") for n in set(steps)}
    sampler = NextTokenSampler(model, [tables[n] for n in steps], cfg_scale=2.5, cfg_schedule="linear")
    assert error(sampler.sample(LABELS, noise), want) <= 1e-10


def test_a_table_for_every_token_or_one(model):
    table = build_table("dpmsolver++", 2, "v_prediction", "cosine")
    with pytest.raises(ValueError, match=r"tables: expected one, or 9 \(one per token\), got 2"):
        NextTokenSampler(model, [table, table], cfg_scale=2.5)


class NoHostSync(TorchDispatchMode):
    """Fails on what makes the host wait for a device, or moves a tensor between them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert "_local_scalar_dense" not in name and "nonzero" not in name, name
        tensors = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, torch.Tensor)]
        assert len({t.device.type for t in tensors}) <= 1, name
        out = function(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        assert not tensors or devices <= {tensors[0].device.type}, name
        return out


@pytest.mark.parametrize("device", DEVICES)
def test_no_host_sync_and_no_new_buffers_in_the_loop(model, noise, device):
    sampler = engine(model.to(device), "v_prediction", 3)
    tokens = sampler.stream(LABELS, noise)
    first = next(tokens)  # before it the batch is allocated and checked
    batch = sampler._batch
    addresses = [t.data_ptr() for t in (batch.h, batch.state, batch.latents, batch.cache.keys, batch.cache.values)]
    with NoHostSync():
        rest = list(tokens)
    model.to("cpu")
    assert len(rest) == 8 and first.shape == (3, 3)
    assert sampler._batch is batch
    again = [t.data_ptr() for t in (batch.h, batch.state, batch.latents, batch.cache.keys, batch.cache.values)]
    assert again == addresses


def test_the_mode_above_would_notice():
    with NoHostSync(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).item()


class Twice:
    """What TokenGraphs does, without CUDA: the first token of a key runs twice, as warm-up and as replay."""

    def __init__(self):
        self.keys = []

    def clear(self):
        self.keys.clear()

    def run(self, key, function, *, keep):
        if key not in self.keys:
            self.keys.append(key)
            saved = [tensor.clone() for tensor in keep]
            function()
            for tensor, value in zip(keep, saved, strict=True):
                tensor.copy_(value)
        function()


def test_a_token_may_be_warmed_up_and_captured_anywhere(model, noise, monkeypatch):
    """Graphs: context buckets, padded batches, one graph for each bucket; what is written twice is the same."""
    monkeypatch.setattr("fastlatent.sampling.autoregressive.CONTEXT_BUCKET", 4)
    want = engine(model).sample(LABELS, noise)
    sampler = engine(model)
    sampler._graphs = Twice()
    assert error(sampler.sample(LABELS, noise), want) <= 1e-10
    assert [context for context, _ in sampler._graphs.keys] == [4, 8, 9]  # 9 tokens
    assert sampler._batch.noise.shape[0] == 4  # 3 rows in a batch of 4
    buffers = sampler._batch
    assert error(sampler.sample(LABELS, noise), want) <= 1e-10  # the same graphs again
    assert sampler._batch is buffers and len(sampler._graphs.keys) == 3
    assert error(sampler.sample(LABELS[:1], noise[:1]), want[:1]) <= 1e-10  # other buffers, other graphs
    assert sampler._batch is not buffers and sampler._batch.noise.shape[0] == 1


def test_batches_larger_than_memory_are_split(model, noise, monkeypatch):
    sampler = engine(model, solver="ddpm")
    want = sampler.sample(LABELS, noise, seed=3)
    monkeypatch.setattr(sampler, "max_batch", lambda: 2)
    rows = []
    assert error(sampler.sample(LABELS, noise, seed=3, on_token=rows.append), want) <= 1e-10
    assert rows == [2] * 9 + [1] * 9


def test_max_batch_is_what_memory_holds(model, monkeypatch):
    sampler = engine(model)
    # 2 ways x 2 layers x 9 tokens x 2 heads x 16 x (keys and values) x 8 bytes
    sequence = 2 * 2 * 9 * 2 * 16 * 2 * 8
    weights = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr("fastlatent.sampling.autoregressive._host_memory", lambda: weights + 11 * sequence)
    assert sampler.max_batch() == 7
    monkeypatch.setattr("fastlatent.sampling.autoregressive._host_memory", lambda: 0)
    assert sampler.max_batch() == 1  # trying is better than refusing


def test_stream_yields_tokens_and_may_be_closed(model, noise):
    sampler = engine(model)
    want = sampler.sample(LABELS, noise)
    tokens = sampler.stream(LABELS, noise)
    got = [next(tokens), next(tokens)]
    tokens.close()
    assert error(torch.stack(got, 1), want[:, :2]) <= 1e-12
    assert torch.equal(torch.stack(list(sampler.stream(LABELS, noise)), 1), want)  # nothing is left of the closed one


def test_on_token_may_stop(model, noise):
    class Stop(Exception):
        pass

    sampler, seen = engine(model), []

    def on_token(rows):
        seen.append(rows)
        if len(seen) == 4:
            raise Stop

    with pytest.raises(Stop):
        sampler.sample(LABELS, noise, on_token=on_token)
    assert seen == [3] * 4


def test_same_bits_on_every_run(model, noise):
    ours = copy.deepcopy(model).bfloat16()
    assert torch.equal(engine(ours).sample(LABELS, noise), engine(ours).sample(LABELS, noise))


def test_weights_are_in_memory_once(model):
    ours = copy.deepcopy(model)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    sampler = engine(ours)
    packed = {t.untyped_storage().data_ptr() for t in sampler.weights.tensors() if t is not None}
    shared = {name for name, p in ours.named_parameters() if p.untyped_storage().data_ptr() in packed}
    assert shared >= {name for name in before if name.startswith(("diffusion_blocks.", "final_layer."))}
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


def scaled(model, factor):
    """Smaller weights: the shared model amplifies an error of 1 % to 100 % within 9 tokens."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.mul_(factor)
    return model


def test_int8_weights(model, noise):
    """Against float64: the error that int8 costs, and that it is int8 that runs."""
    calm = scaled(model, 1 / 3)
    want = engine(calm, steps=3).sample(LABELS, noise)
    sampler = engine(copy.deepcopy(calm).float(), steps=3, int8=True)
    assert sampler.weights.up_weight.dtype == torch.int8
    assert {layer.qkv.weight.dtype for layer in sampler.backbone._layers} == {torch.int8}
    got = sampler.sample(LABELS, noise)
    assert 1e-4 < error(got.double(), want) < 0.1


def test_fp8_cache(model, noise):
    calm = scaled(model, 1 / 3)
    want = engine(calm, steps=3).sample(LABELS, noise)
    sampler = engine(copy.deepcopy(calm).float(), steps=3, kv_dtype=torch.float8_e4m3fn)
    got = sampler.sample(LABELS, noise)
    assert sampler._batch.cache.keys.dtype == torch.float8_e4m3fn
    assert 1e-4 < error(got.double(), want) < 0.2


def test_published_rounds_timesteps(model, noise):
    ours = copy.deepcopy(model).bfloat16()
    exact, published = engine(ours, steps=3), engine(ours, steps=3, published=True)
    # bfloat16 holds 999 as 1000; the step after the first is 666 -> 664, the last 333 as it is... to 332 or 334.
    assert not torch.equal(exact._steps[0].t_embedding[0], published._steps[0].t_embedding[0])
    assert not torch.equal(exact.sample(LABELS, noise), published.sample(LABELS, noise))
    double = engine(model, steps=3, published=True)
    assert error(double.sample(LABELS, noise), engine(model, steps=3).sample(LABELS, noise)) <= 1e-10


def test_noise_drawn_as_the_published_loop_draws_it(model):
    """It draws 2·B rows for every token and uses the first B: the same generator and slicing give the same tokens."""
    state, sizes, generator = model.state_dict(), vars(CONFIG), torch.Generator().manual_seed(5)
    latents, drawn = torch.zeros(3, 0, 3, dtype=torch.float64), []
    rows = torch.cat([LABELS, torch.full_like(LABELS, CONFIG.num_classes)])
    for _ in range(CONFIG.num_tokens):
        z = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        condition = plain_latentlm.conditions(state, sizes, torch.cat([latents, latents]), rows)[:, -1]

        def predict(x, t, condition=condition):  # x [6, 3], of which the published code reads the first half
            both = plain_latentlm.head(state, sizes, torch.cat([x[:3], x[:3]]), t, condition)
            guided = both[3:] + 2.5 * (both[:3] - both[3:])
            return torch.cat([guided, guided])

        token = plain_latentlm.dpmsolver_2m(predict, z, 3, "v_prediction")
        latents = torch.cat([latents, token[:3, None]], 1)
        drawn.append(z)
    noise = torch.stack(drawn, 1)
    assert error(engine(model, steps=3).sample(LABELS, noise[:3]), latents) <= 1e-10
    assert error(engine(model, steps=3).sample(LABELS, noise[3:]), latents) > 1e-3
