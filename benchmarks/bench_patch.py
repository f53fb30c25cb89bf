"""`fastlatent.patch` against the models it patches: seconds per token, condition to latent, by the model's own method.

One token with guidance, two rows, at the sizes and steps of the checkpoints (MAR: 20, Harmon: 10 of their 100 steps,
in which all providers are linear). VibeVoice's head and loop are those of transformers; the others are the doubles of
tests/patches, which do at each step what their projects do. Weights are random and have no backbone.

fastlatent          the patched model; checking whether weights have changed is part of it
original            the model as it is
original-compiled   its network under torch.compile, in its own loop: what can be had without changing the loop
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import pytest
import rows as row_files
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "patches"))  # as pytest has it

import toy_latentlm
import toy_mar
import toy_nextstep

from fastlatent.patches.patch import patch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
STEPS = {"MAR-L": 20, "Harmon-1.5B": 10, "NextStep-1": 20, "VibeVoice-1.5B": 10, "LatentLM-Medium": 20}
PROVIDERS = ("fastlatent", "original", "original-compiled")
CASES = [
    harness.Case(
        "patch",
        {"model": model, "rows": 2, "steps": steps},
        DTYPE,
        DEVICE,
        PROVIDERS,
        threads=row_files.cpu_cores() if DEVICE == "cpu" else 1,
    )
    for model, steps in STEPS.items()
]

# ---- a token of each model ---------------------------------------------------------------------------------


class Speaker(nn.Module):
    """transformers' VibeVoice 1.5B, its diffusion head and loop alone."""

    def __init__(self) -> None:
        from transformers.models.vibevoice import generation_vibevoice, modeling_vibevoice
        from transformers.models.vibevoice.configuration_vibevoice import VibeVoiceDiffusionHeadConfig

        super().__init__()
        config = VibeVoiceDiffusionHeadConfig(hidden_size=1536, latent_size=64, num_hidden_layers=4)
        self.model = nn.Module()
        self.model.diffusion_head = modeling_vibevoice.VibeVoiceDiffusionHead(config)
        self.config = SimpleNamespace(audio_config=SimpleNamespace(hidden_size=64))
        self._loop = generation_vibevoice.VibeVoiceGenerationMixin._sample_audio_latent

    def _sample_audio_latent(
        self, positive_condition: Any, negative_condition: Any, noise_scheduler: Any, num_diffusion_steps: int,
        guidance_scale: float,
    ) -> Any:  # fmt: skip
        return self._loop(
            self, positive_condition, negative_condition, noise_scheduler, num_diffusion_steps, guidance_scale
        )


class Mar(nn.Module):
    """The sampling of MAR alone."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.diffloss = toy_mar.DiffLoss(target_channels=16, **sizes)


class NextStep(nn.Module):
    """The sampling of NextStep-1 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.image_head = toy_nextstep.FlowMatchingHead1(64, 5120)


class Harmon(nn.Module):
    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.mar = Mar(**sizes)


Token = Callable[[Any], object]  # model → what its own method gives for one condition
Network = Callable[[Any], tuple[Any, str]]  # model → whose method, under what name, evaluates the network once


def make(name: str, steps: int) -> tuple[nn.Module, Network, Token]:
    """A model with random weights, the method to compile in it, and how it makes a token."""

    def condition(rows: int, channels: int) -> torch.Tensor:
        return torch.randn(rows, channels, device=DEVICE).to(getattr(torch, DTYPE))

    model: nn.Module
    if name in ("MAR-L", "Harmon-1.5B"):
        sizes = (
            {"width": 1280, "depth": 8, "z_channels": 1024}
            if name == "MAR-L"
            else {"width": 1536, "depth": 12, "z_channels": 1280}
        )
        model = (Mar if name == "MAR-L" else Harmon)(num_sampling_steps=str(steps), **sizes)
        z = condition(2, sizes["z_channels"])

        def loss(model: Any) -> Any:
            return model.diffloss if name == "MAR-L" else model.mar.diffloss

        return model, lambda m: (loss(m).net, "forward_with_cfg"), lambda m: loss(m).sample(z, 1.0, 3.0)
    if name == "NextStep-1":
        c = condition(2, 5120)
        return (
            NextStep(),
            lambda m: (m.image_head.net, "forward"),
            lambda m: m.image_head.sample(c=c, cfg=7.5, num_sampling_steps=steps),
        )
    scheduler = toy_latentlm.DPMSolverMultistepScheduler(prediction_type="v_prediction")
    if name == "VibeVoice-1.5B":
        pair = condition(1, 1536), condition(1, 1536)
        return (
            Speaker(),
            lambda m: (m.model.diffusion_head, "forward"),
            lambda m: m._sample_audio_latent(*pair, scheduler, steps, 1.3),
        )
    assert name == "LatentLM-Medium", name
    model = toy_latentlm.Transformer(1, 16, hidden_size=1024, width=4096, depth=0, diffusion_depth=3)
    labels, p_sample = torch.tensor([3, 10], device=DEVICE), toy_latentlm.p_sample_of(scheduler, steps)
    return model, lambda m: (m, "forward_with_cfg"), lambda m: m.sample_with_cfg(labels, 2.5, p_sample)


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    torch.compiler.reset()
    torch.manual_seed(0)
    model, network, token = make(str(case.sizes["model"]), int(case.sizes["steps"]))
    model = toy_mar.randomise(model).to(device=DEVICE, dtype=getattr(torch, DTYPE))

    def running(change: Callable[[Any], object]) -> Callable[[], object]:
        """A token of a copy that is changed first; the copies share their weights."""
        ours = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        change(ours)

        @torch.no_grad()
        def run() -> object:
            return token(ours)

        return run

    def compile_network(model: Any) -> None:
        owner, name = network(model)
        method = getattr(owner, name)
        setattr(owner, name, torch.compile(getattr(method, "original", method).__get__(owner)))

    try:
        yield harness.Prepared(
            {
                "fastlatent": lambda: running(patch),
                "original": lambda: running(lambda _: None),
                "original-compiled": lambda: running(compile_network),
            },
            rivals=("original", "original-compiled"),
        )
    finally:
        torch.set_num_threads(threads_before)


# ---- pytest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_patch(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
