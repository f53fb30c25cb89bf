"""The published projects' own classes, where they are installed: a second opinion on the names and on every switch."""

import math

import pytest
import torch

from fastlatent.heads.diffusion_head import DiffusionHead


def randomise(module):
    """Weights of std 0.1, norms' about 1, in float64."""
    generator = torch.Generator().manual_seed(0)
    module.double().requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.normal_(std=0.1, generator=generator)
        if parameter.ndim == 1 and name.endswith(("norm.weight", "in_ln.weight", "alpha")):
            parameter += 1


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("times", [0, 1, 2])
def test_pocket_tts(times):
    mlp = pytest.importorskip("pocket_tts.modules.mlp")
    net = mlp.SimpleMLPAdaLN(8, 64, 8, 48, 3, num_time_conds=times)
    randomise(net)
    head = DiffusionHead.from_state_dict({"flow_lm.flow_net." + name: t for name, t in net.state_dict().items()})
    assert head.spec.time_embedders == times
    x, c, t = torch.randn(5, 8).double(), torch.randn(5, 48).double(), torch.rand(5, 2).double()
    want = net(c, *(t[:, i : i + 1] for i in range(times)), x)
    assert relative(head(x, t if times == 2 else t[:, 0], c), want) < 1e-12


def test_vibevoice_of_transformers(monkeypatch):
    port = pytest.importorskip("transformers.models.vibevoice.modeling_vibevoice")
    config = pytest.importorskip("transformers.models.vibevoice.configuration_vibevoice")
    net = port.VibeVoiceDiffusionHead(
        config.VibeVoiceDiffusionHeadConfig(hidden_size=64, latent_size=8, num_hidden_layers=3, intermediate_size=96)
    )
    randomise(net)

    def norm_in_float64(self, x):  # the published one is float32 inside
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(port.VibeVoiceRMSNorm, "forward", norm_in_float64)
    net.timestep_embedding.freq = torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    head = DiffusionHead.from_state_dict({"model.diffusion_head." + name: t for name, t in net.state_dict().items()})
    x, c, t = torch.randn(5, 8).double(), torch.randn(5, 64).double(), torch.tensor([999.0, 451, 3, 0, 77]).double()
    assert relative(head(x, t, c), net(x, t, c)) < 1e-12
