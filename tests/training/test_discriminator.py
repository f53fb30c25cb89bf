import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastlatent.training.discriminator import (
    SMALLEST_SIDE,
    BatchNorm,
    PatchDiscriminator,
    adaptive_weight,
    hinge,
)


def images(seed, side=32, channels=3):
    return torch.rand(4, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shapes_and_sizes():
    model = PatchDiscriminator(3)
    # The published discriminator: n_layers 3, ndf 64, biases only where no BatchNorm follows.
    convolutions = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1
    assert sum(p.numel() for p in model.parameters()) == convolutions + 2 * (128 + 256 + 512) == 2_765_633
    assert model(images(0, 256).float()[:1]).shape == (1, 1, 30, 30)
    assert PatchDiscriminator(1)(images(0, SMALLEST_SIDE, 1).float()).shape == (4, 1, 1, 1)
    with pytest.raises(RuntimeError, match="size"):
        PatchDiscriminator(1)(images(0, SMALLEST_SIDE - 1, 1).float())
    norms = [layer for layer in model if isinstance(layer, BatchNorm)]
    scales = torch.cat([norm.weight.detach() for norm in norms])
    assert abs(float(scales.mean()) - 1) < 0.005
    assert abs(float(scales.std()) - 0.02) < 0.003
    assert abs(float(model[2].weight.detach().std()) - 0.02) < 1e-3


def test_batch_norm_is_torchs():
    torch.manual_seed(0)
    mine, theirs = BatchNorm(5).double(), nn.BatchNorm2d(5, track_running_stats=False).double()
    nn.init.normal_(mine.bias)
    theirs.load_state_dict(mine.state_dict())
    x = images(1, 6).repeat(1, 2, 1, 1)[:, :5] * 3 + 1
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = mine(a), theirs(b)
    torch.testing.assert_close(got, want)
    for out in (got, want):
        out.pow(3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(mine.weight.grad, theirs.weight.grad)


def test_hinge():
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    assert float(hinge(real, made)) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1) / 2))


def test_frozen_gives_gradients_to_the_images_alone():
    torch.manual_seed(0)
    model, x = PatchDiscriminator(3).double(), images(1).requires_grad_()
    y = x.detach().clone().requires_grad_()
    value = model.frozen(x)
    assert torch.equal(value, model(y))
    value.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    model(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_adaptive_weight():
    last = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    images = 2 * last  # 6, -2

    def value(reconstruction, adversarial):
        weight = adaptive_weight(reconstruction, adversarial, images, last)
        assert not weight.requires_grad
        return float(weight)

    # gradients 2·2·(6, −2) and 2·(0.5, 0.5)
    assert value(images.square().sum(), 0.5 * images.sum()) == pytest.approx(640**0.5 / (2**0.5 + 1e-4), rel=1e-14)
    assert value(images.square().sum(), 0 * images.sum()) == 1e4  # 2.5e5, clamped
    assert value(0 * images.sum(), images.sum()) == 0
    assert last.grad is None


def test_adaptive_weight_in_float16():
    # As of 64 images of 1024²: a pixel's gradient is 5e-9, and 0 in float16.
    last = nn.Parameter(torch.ones(3))
    images = (last * torch.ones(1000, 3)).half().float()
    small = images.sum() / (64 * 3 * 1024**2)
    assert float(adaptive_weight(4 * small, small, images, last)) == pytest.approx(
        4 * 1000 * 3**0.5 / (1000 * 3**0.5 + 1e-4 * 64 * 3 * 1024**2), rel=1e-3
    )


RANK = """
import json, sys
import torch
import torch.distributed as dist
from fastlatent.training.discriminator import PatchDiscriminator, adaptive_weight, hinge

def run(rank, world):
    torch.manual_seed(0)
    model = PatchDiscriminator(1).double()
    last = torch.nn.Conv2d(1, 1, 3, padding=1).double()
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(4, 1, 24, 24, generator=generator, dtype=torch.float64) * 2 + 3)[rank::world]
    made = last(x)
    game = -model.frozen(made).mean()
    factor = adaptive_weight((made - x).square().mean(), game, made, last.weight)
    loss = factor * game + hinge(model(x), model(made.detach()))
    loss.backward()
    values = [loss.detach(), *(p.grad for p in (*last.parameters(), *model.parameters()))]
    if world > 1:
        for value in values:
            dist.all_reduce(value)
            value /= world
    return [float(factor), float(values[0]), *(value.norm().item() for value in values[1:])]

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
    print(json.dumps(run(int(sys.argv[1]), 2)))
"""


def test_two_processes_are_as_one(tmp_path):
    """Batch statistics and gradient norms of all samples, wherever they are: values, gradients and the factor."""
    (tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(tmp_path / "rank.py")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "met")], stdout=subprocess.PIPE, env=environment)
        for rank in range(2)
    ]
    one = runpy.run_path(str(tmp_path / "rank.py"))["run"](0, 1)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for output in outputs:
        assert json.loads(output) == pytest.approx(one, rel=1e-9)
    assert len(one) > 10
