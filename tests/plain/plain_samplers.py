"""Samplers written down again, plainly, in float64: the published loops one token at a time, and diffusers' own.

Each returns the states after every call of the network, [calls, B, C]. Nothing of fastlatent.
"""

import functools
import importlib
import inspect
import math
import types

import torch

BATCH, CHANNELS = 3, 4


def network(x, t):
    """A nonlinear network in float64, different at every timestep."""
    return torch.tanh(1.3 * x + 0.1 * x.roll(1, -1)) + 0.3 * torch.sin(x * (1 + t / 500)) + 0.01


def learned_variance_network(x, t):
    """The same with a variance beside it, mostly within -1 and 1."""
    return torch.cat([network(x, t), torch.cos(x + t / 300)], dim=-1)


def two_time_network(x, times):
    return network(x, 500 * times[0]) - 0.2 * torch.cos(x + times[1])


def start():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, CHANNELS, generator=generator, dtype=torch.float64)


def noises(steps):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, BATCH, CHANNELS, generator=generator, dtype=torch.float64)


@functools.cache
def in_float64(class_name, module_name):
    """A diffusers scheduler, its source executed again with float64 in place of float32."""
    original = importlib.import_module(f"diffusers.schedulers.{module_name}")
    module = types.ModuleType(f"{original.__package__}.{module_name}_float64")
    module.__package__ = original.__package__
    source = inspect.getsource(original)
    assert "float32" in source
    exec(compile(source.replace("float32", "float64"), original.__file__, "exec"), module.__dict__)
    return getattr(module, class_name), module


def diffusers_states(scheduler, module, monkeypatch, model=network, **step_options):
    """Every state of a scheduler after its set_timesteps, with the noise of `noises`."""
    shared = iter(noises(len(scheduler.timesteps)))
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: next(shared), raising=False)
    if hasattr(scheduler, "set_begin_index"):
        # As pipelines do; by itself a scheduler whose first timestep occurs twice skips the first of them.
        scheduler.set_begin_index(0)
    x, states = start(), []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.double()), t, x, return_dict=False, **step_options)[0]
        assert x.dtype == torch.float64
        states.append(x)
    return torch.stack(states)


def mar_states(steps, temperature):
    """p_sample_loop of guided diffusion with learned_range variance, respaced from 1000 cosine steps."""

    def bar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - bar((i + 1) / 1000) / bar(i / 1000), 0.999) for i in range(1000)]
    stride = 999 / (steps - 1) if steps > 1 else 1
    position, kept = 0.0, []
    for _ in range(steps):
        kept.append(round(position))
        position += stride
    # The published code goes on from products to betas and back, which costs seven digits where 1 - beta is 1e-9.
    product, products = 1.0, []
    for i, beta in enumerate(betas):
        product *= 1 - beta
        if i in kept:
            products.append(product)
    x, states = start(), []
    for call, i in enumerate(reversed(range(steps))):
        ab, previous = products[i], products[i - 1] if i else 1.0
        beta = 1 - ab / previous
        epsilon, v = learned_variance_network(x, kept[i]).chunk(2, dim=-1)
        data = x / math.sqrt(ab) - math.sqrt(1 / ab - 1) * epsilon
        mean = beta * math.sqrt(previous) / (1 - ab) * data + (1 - previous) * math.sqrt(ab / previous) / (1 - ab) * x
        if i:
            low, high = math.log(beta * (1 - previous) / (1 - ab)), math.log(beta)
            log_variance = (v + 1) / 2 * high + (1 - (v + 1) / 2) * low
            mean = mean + torch.exp(0.5 * log_variance) * noises(steps)[call] * temperature
        x = mean
        states.append(x)
    return torch.stack(states)


def nextstep_states(steps, shift):
    t = [0.96 * i / (steps - 1) for i in range(steps)]
    t = [u / (shift - (shift - 1) * u) for u in t]
    x, states = start(), []
    for i in range(steps - 1):
        dt = t[i + 1] - t[i]
        v = network(x, t[i])
        sigma = 1 - t[i]
        score = (t[i] * v - x) / (sigma**2 + t[i] * sigma)
        drift = v + sigma * score
        x = x + drift * dt + math.sqrt(2 * sigma) * math.sqrt(dt) * noises(steps)[i]
        states.append(x)
    states.append(x + network(x, t[-1]) * 0.04)
    return torch.stack(states)


def ming_states(steps, time_scale):
    x, states = start(), []
    for i in range(steps):
        t = 1 - i / steps
        x = x + network(x, time_scale * t) / steps
        states.append(x)
    return torch.stack(states)


def calm_flow_states(evaluations):
    steps = evaluations // 2
    dt = 1 / steps
    x, states = start(), []
    for step in range(steps):
        t = torch.full((1,), step / steps)
        middle = x + 0.5 * dt * network(x, (t * 1000).long().item())
        x = x + dt * network(middle, ((t + 0.5 * dt) * 1000).long().item())
        states += [middle, x]
    return torch.stack(states)


def pocket_tts_states(steps):
    x, states = start(), []
    for i in range(steps):
        x = x + two_time_network(x, (i / steps, (i + 1) / steps)) / steps
        states.append(x)
    return torch.stack(states)


def orthus_states(steps):
    """DDIM over scaled_linear betas with zero terminal SNR, trailing timesteps, v-prediction."""
    betas = [(math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for i in range(1000)]
    product, roots = 1.0, []
    for beta in betas:
        product *= 1 - beta
        roots.append(math.sqrt(product))
    roots = [(root - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for root in roots]
    x, states = start(), []
    for k in range(steps):
        t = round(1000 - k * 1000 / steps) - 1
        following = round(1000 - (k + 1) * 1000 / steps) - 1
        alpha, alpha_next = roots[t], roots[following] if following >= 0 else 1.0
        sigma = math.sqrt(1 - alpha**2)
        v = network(x, t)
        x = alpha_next * (alpha * x - sigma * v) + math.sqrt(1 - alpha_next**2) * (alpha * v + sigma * x)
        states.append(x)
    return torch.stack(states)
