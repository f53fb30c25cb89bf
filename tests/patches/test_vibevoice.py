"""VibeVoice's sampling, patched and not: the class of transformers, and a structural double of the original one."""

import copy
import io
import pickle
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from plain_samplers import in_float64
from torch import nn
from toy_latentlm import DPMSolverMultistepScheduler as OriginalScheduler
from toy_latentlm import RMSNorm, TimestepEmbedder, randomise, relative, same_noise

from fastlatent.patches.patch import patch

transformers = pytest.importorskip("transformers")
port = pytest.importorskip("transformers.models.vibevoice.modeling_vibevoice")
torch.set_num_threads(1)
BOS, EOS, END, AUDIO = 2, 1, 3, 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


def tiny(**head):
    audio = {"hidden_size": 8, "num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
    text = {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.VibeVoiceConfig(
        text_config=text,
        diffusion_head_config={"num_hidden_layers": 2, "intermediate_size": 96, **head},
        audio_config={"model_type": "vibevoice_acoustic_tokenizer", **audio},
        semantic_model_config={"model_type": "vibevoice_acoustic_tokenizer_encoder", **audio},
        pad_token_id=0, eos_token_id=EOS, audio_bos_token_id=BOS, audio_eos_token_id=END, audio_token_id=AUDIO,
    )  # fmt: skip
    model = transformers.VibeVoiceForConditionalGeneration(config).eval()
    randomise(model.model.diffusion_head)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


def scheduler(**options):
    return diffusers.DPMSolverMultistepScheduler(
        **{"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", **options}
    )


def latent(model, noise_scheduler, batch=2, steps=5, scale=1.3, seed=0):
    weight = model.model.diffusion_head.cond_proj.weight
    generator = torch.Generator().manual_seed(seed)
    conditions = [torch.randn(batch, 64, generator=generator).bfloat16().to(weight) for _ in range(2)]
    with torch.no_grad():
        return model._sample_audio_latent(*conditions, noise_scheduler, steps, scale)


def both(model, noise_scheduler, sample=latent, **options):
    """Relative difference between one seed's latents without and with the patch; the generator ends where it would."""
    out, after = [], []
    for patched in (False, True):
        handle = patch(model) if patched else None
        torch.manual_seed(3)
        out.append(sample(model, noise_scheduler, **options))
        after.append(torch.rand(()))
        if handle:
            handle.undo()
    assert after[0] == after[1]
    assert out[0].shape == out[1].shape and out[0].dtype == out[1].dtype
    return relative(out[1], out[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_float64_is_equal(monkeypatch, batch):
    model = tiny().double()
    # As published: the scheduler's tables and state are float32, and so is the inside of the head's norm.
    assert both(model, scheduler(), batch=batch) < 1e-5

    def norm_in_float64(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    wide, _ = in_float64("DPMSolverMultistepScheduler", "scheduling_dpmsolver_multistep")
    monkeypatch.setattr(port.VibeVoiceRMSNorm, "forward", norm_in_float64)
    exact = wide(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    assert both(model, exact, batch=batch) < 1e-9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (scheduler, {"steps": 10}),
        (scheduler, {"scale": 1.0}),  # guidance 1: one branch alone
        (lambda: scheduler(algorithm_type="sde-dpmsolver++"), {}),  # noise at every step, of 2B rows in float32
        (lambda: scheduler(algorithm_type="sde-dpmsolver++"), {"steps": 1}),  # draws, and multiplies by 0
        (lambda: diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False), {}),  # none at t = 0
        (lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False), {}),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {}),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}),
    ],
)
def test_schedulers(device, model, make, options):
    assert both(model if device == "cpu" else copy.deepcopy(model).to(device), make(), **options) < 2e-5


def test_modes_of_torch(model):
    """Inference mode and autocast, whoever comes first; and a head as it is before training, all zeros."""
    noise = scheduler()
    results = []
    with patch(model):
        for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
            torch.manual_seed(0)
            with mode:
                results.append(latent(model, noise))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])  # in the weights' dtype
    with torch.inference_mode():  # its parameters have no versions
        made = tiny()
        for parameter in made.model.diffusion_head.parameters():
            parameter.zero_()
        assert both(made, noise) < 1e-5


def test_autocast_rounds_nothing_that_is_kept(model):
    """Neither the proof nor the time embeddings; the backbone's conditions are bfloat16 then."""
    noise = scheduler()
    torch.manual_seed(0)
    want = latent(model, noise)
    with torch.autocast("cpu", torch.bfloat16):
        handle = patch(model)
        latent(model, noise)
        with torch.no_grad():
            conditions = (torch.ones(2, 64, dtype=torch.bfloat16),) * 2
            assert model._sample_audio_latent(*conditions, noise, 5, 1.3).dtype == torch.bfloat16
    torch.manual_seed(0)
    assert relative(latent(model, noise), want) < 1e-5
    handle.undo()


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_activation_shows_through_rounding(dtype):
    model = tiny()
    for layer in model.model.diffusion_head.layers:
        layer.ffn.act_fn = QuickGelu()
    with pytest.raises(ValueError, match="other tokens"):
        patch(model.to(dtype))


def test_bfloat16_errs_no_more_than_unpatched(monkeypatch):
    model = tiny().bfloat16()
    exact = copy.deepcopy(model).double()
    exact.model.diffusion_head.timestep_embedding.freq.copy_(model.model.diffusion_head.timestep_embedding.freq)
    errors = [0.0, 0.0]
    for seed in range(6):
        results = []
        for net, patched in ((exact, False), (model, False), (model, True)):
            with monkeypatch.context() as draws:
                handle = patch(net) if patched else None
                same_noise(draws, seed)
                results.append(latent(net, scheduler(), batch=4, steps=10, seed=seed))
                if handle:
                    handle.undo()
        assert results[2].dtype == torch.bfloat16
        errors = [total + relative(got, results[0]) for total, got in zip(errors, results[1:], strict=True)]
    assert errors[1] <= 1.5 * errors[0]


def test_schedulers_and_weights_are_followed():
    model = tiny()
    head = model.model.diffusion_head
    other = {name: value * 1.1 for name, value in head.state_dict().items()}
    one, flow = scheduler(), diffusers.FlowMatchEulerDiscreteScheduler()

    def compared(noise_scheduler, **options):
        torch.manual_seed(0)
        got = latent(model, noise_scheduler, **options)
        assert len(noise_scheduler.timesteps) == options.get("steps", 5)
        theirs = copy.deepcopy(model)
        torch.manual_seed(0)
        return relative(got, latent(theirs, copy.deepcopy(noise_scheduler), **options))

    with patch(model):
        for steps in (5, 7, 5):
            assert compared(one, steps=steps) < 1e-5
        one.register_to_config(final_sigmas_type="sigma_min")
        assert compared(one) < 1e-5
        assert compared(flow) < 1e-5
        flow.set_shift(2.0)
        assert compared(flow) < 1e-5
        with torch.no_grad():
            head.layers[0].ffn.up_proj.weight.mul_(1.5)
        assert compared(one) < 1e-5
        head.load_state_dict(other)
        assert compared(one) < 1e-5
        model.bfloat16()
        assert compared(one) < 0.05
        model.float()  # rounded weights, perhaps at the old addresses
        assert compared(one) < 1e-5
        with pytest.raises(ValueError, match="EulerDiscreteScheduler.*undo the patch"):
            latent(model, diffusers.EulerDiscreteScheduler())
        own = type("DPMSolverMultistepScheduler", (), {"set_timesteps": one.set_timesteps, "step": one.step})()
        own.timesteps = one.timesteps
        with pytest.raises(ValueError, match="options in `config`.*undo the patch"):
            latent(model, own)


class OnlyAudio:
    """Three frames of audio for every row, then the end."""

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -1e9)
        forced[:, AUDIO if ids.shape[1] < 6 else EOS] = 0
        return forced


def test_generate(model):
    ids, mask = torch.tensor([[5, 6, BOS], [0, 7, BOS]]), torch.tensor([[1, 1, 1], [0, 1, 1]])

    def generate():
        torch.manual_seed(0)
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, logits_processor=[OnlyAudio()], guidance_scale=1.3
        )

    want = generate()
    with patch(model) as handle:
        got = generate()
        assert handle.replaced == ["_sample_audio_latent"]
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape == (1, 12)  # 3 frames, 4 samples each
        assert relative(one, other) < 1e-4


def test_copies_have_their_own_loop(model):
    before = dict(vars(model))
    keys = list(model.state_dict())
    handle = patch(model)
    assert list(model.state_dict()) == keys
    clone, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    handle.undo()
    assert vars(model) == before
    noise = scheduler()
    for other in (clone, thawed, torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
        with torch.no_grad():  # a loop that still had the first model's head would not notice
            other.model.diffusion_head.final_layer.linear_2.weight.mul_(2)
            theirs = copy.deepcopy(model)
            theirs.model.diffusion_head.final_layer.linear_2.weight.mul_(2)
        torch.manual_seed(0)
        got = latent(other, noise)
        torch.manual_seed(0)
        assert torch.equal(got, latent(theirs, noise))
        assert both(other, noise) < 1e-5  # and can be patched


def change(head, name, value):
    owner, _, last = name.rpartition(".")
    setattr(head.get_submodule(owner), last, value)


@pytest.mark.parametrize(
    ("options", "spoil", "says"),
    [
        ({"mlp_bias": True}, lambda h: None, r"gate_proj\.bias"),
        ({"hidden_act": "gelu"}, lambda h: None, "to be SiLU, got GELU"),
        ({"rms_norm_eps": 1e-6}, lambda h: None, "variance_epsilon 1e-05, got 1e-06"),
        ({}, lambda h: delattr(h, "timestep_proj"), "timestep_proj, which is missing"),
        ({}, lambda h: change(h, "layers.1.norm", nn.LayerNorm(64)), "RMSNorm, got LayerNorm"),
        ({}, lambda h: change(h, "layers.1.extra", nn.Parameter(torch.ones(3))), r"layers\.1\.extra"),
        ({}, lambda h: change(h, "forward", lambda *a, **k: 2 * type(h).forward(h, *a, **k)), "other tokens"),
        ({}, lambda h: h.to("meta"), "on meta"),
    ],
)
def test_what_looks_like_it(options, spoil, says):
    model = tiny(**options)
    spoil(model.model.diffusion_head)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=says):
        patch(model)
    assert vars(model) == before


def test_a_loop_of_other_arguments():
    model = tiny()
    vars(model)["_sample_audio_latent"] = lambda condition, noise_scheduler: condition
    with pytest.raises(ValueError, match=r"expected _sample_audio_latent\(positive_condition"):
        patch(model)


class Layer(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.norm = RMSNorm(1e-5)
        self.norm.weight = nn.Parameter(torch.ones(hidden))
        self.ffn = nn.Module()
        self.ffn.gate_proj = nn.Linear(hidden, width, bias=False)
        self.ffn.up_proj = nn.Linear(hidden, width, bias=False)
        self.ffn.down_proj = nn.Linear(width, hidden, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3 * hidden, bias=False))

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, -1)
        h = self.norm(x) * self.norm.weight * (1 + scale) + shift
        return x + gate * self.ffn.down_proj(F.silu(self.ffn.gate_proj(h)) * self.ffn.up_proj(h))


class OriginalHead(nn.Module):
    def __init__(self, hidden=64, channels=8):
        super().__init__()
        self.noisy_images_proj = nn.Linear(channels, hidden, bias=False)
        self.cond_proj = nn.Linear(hidden, hidden, bias=False)
        self.t_embedder = TimestepEmbedder(hidden)
        self.layers = nn.ModuleList(Layer(hidden, 96) for _ in range(2))
        self.final_layer = nn.Module()
        self.final_layer.norm_final = RMSNorm(1e-5)
        self.final_layer.linear = nn.Linear(hidden, channels, bias=False)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden, bias=False))

    def forward(self, noisy_images, timesteps, condition):
        c = self.cond_proj(condition) + self.t_embedder(timesteps)
        x = self.noisy_images_proj(noisy_images)
        for layer in self.layers:
            x = layer(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, -1)
        return self.final_layer.linear(self.final_layer.norm_final(x) * (1 + scale) + shift)


class VibeVoiceForConditionalGenerationInference(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(acoustic_vae_dim=8)
        self.model = nn.Module()
        self.model.prediction_head = randomise(OriginalHead())
        self.model.noise_scheduler = OriginalScheduler(prediction_type="v_prediction")
        self.ddpm_inference_steps = 5

    def sample_speech_tokens(self, condition, neg_condition, cfg_scale=3.0):
        noise_scheduler = self.model.noise_scheduler
        noise_scheduler.set_timesteps(self.ddpm_inference_steps)
        condition = torch.cat([condition, neg_condition])
        speech = torch.randn(len(condition), self.config.acoustic_vae_dim).to(condition)
        for t in noise_scheduler.timesteps:
            half = speech[: len(speech) // 2]
            combined = torch.cat([half, half])
            eps = self.model.prediction_head(combined, t.repeat(len(combined)).to(combined), condition=condition)
            cond_eps, uncond_eps = eps.chunk(2)
            half_eps = uncond_eps + cfg_scale * (cond_eps - uncond_eps)
            speech = noise_scheduler.step(torch.cat([half_eps, half_eps]), t, speech).prev_sample
        return speech[: len(speech) // 2]


def test_the_original_class():
    model = VibeVoiceForConditionalGenerationInference()

    def sample(model, noise_scheduler):
        model.model.noise_scheduler = noise_scheduler
        with torch.no_grad():
            return model.sample_speech_tokens(torch.ones(2, 64), torch.zeros(2, 64))

    for options in ({}, {"algorithm_type": "sde-dpmsolver++"}):
        assert both(model, OriginalScheduler(prediction_type="v_prediction", **options), sample) < 1e-5
    inner = dict(vars(model.model))
    for spoiled in ({"ddpm_inference_steps": None}, {"sample_speech_tokens": lambda condition: condition}):
        with pytest.raises(ValueError, match="ddpm_inference_steps|sample_speech_tokens"):
            patch(SimpleNamespace(model=model.model, **spoiled))
    assert vars(model.model) == inner
