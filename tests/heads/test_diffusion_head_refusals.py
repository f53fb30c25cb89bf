"""Wrong input to a head: every error names the function, what was expected and what came."""

import plain_heads
import pytest
import torch

from fastlatent.diffusion.published import flow_euler_up
from fastlatent.diffusion.solvers import SolverTable
from fastlatent.heads.diffusion_head import DiffusionHead


def refusals():
    """(arguments of sample that replace good ones, what the error says)."""
    z, table = torch.zeros(4, 7), flow_euler_up(2)
    return {
        "cond is a list": ({"cond": [1.0]}, r"sample: expected cond \[B, 7\] of floating point, got list"),
        "cond without batch": ({"cond": z[0]}, r"expected cond \[B, 7\].*got \[7\] torch.float32"),
        "cond too wide": ({"cond": torch.zeros(4, 8)}, r"expected cond \[B, 7\].*got \[4, 8\]"),
        "cond whole numbers": ({"cond": z.long()}, "expected cond.*floating point, got .*int64"),
        "null rows": ({"null_cond": z[:3], "guidance_scale": 2.0}, r"expected null_cond \[4, 7\].*got \[3, 7\]"),
        "null of three": ({"null_cond": (z, z, z), "guidance_scale": (1.0, 2.0, 3.0)}, "pair of each, got 3 and 3"),
        "pair and number": ({"null_cond": (z, z), "guidance_scale": 2.0}, "pair of each, got 2 and 1"),
        "number and pair": ({"null_cond": z, "guidance_scale": (2.0, 2.0)}, "pair of each, got 1 and 2"),
        "guidance alone": ({"guidance_scale": 2.0}, "expected null_cond, .* for guidance_scale 2.0"),
        "tensor alone": ({"guidance_scale": torch.ones(4)}, "expected null_cond"),
        "pair alone": ({"guidance_scale": (2.0, 2.0)}, "got 0 and 2"),
        "guidance NaN": ({"null_cond": z, "guidance_scale": float("nan")}, "finite guidance_scale, got nan"),
        "guidance word": ({"null_cond": z, "guidance_scale": "3"}, "finite guidance_scale, got '3'"),
        "guidance rows": ({"null_cond": z, "guidance_scale": torch.ones(3)}, r"guidance_scale \[4\], got \[3\]"),
        "solver name": ({"solver": "ddim"}, "expected solver to be a SolverTable, got str"),
        "noise": ({"noise": torch.zeros(4, 10)}, r"expected noise \[4, 5\].*got \[4, 10\]"),
        "step noise": ({"step_noise": torch.zeros(4, 2, 5)}, r"expected step_noise \[2, 4, 5\].*got \[4, 2, 5\]"),
        "path": ({"path": "fast"}, "expected a path of auto, reference, few_rows, many_rows, got 'fast'"),
        "two times": ({"solver": SolverTable(table.rows, torch.zeros(2, 2), "two")}, r"expected timesteps \[S\] for 1"),
    }


@pytest.mark.parametrize("case", refusals())
def test_sample_refuses(case):
    head = DiffusionHead.from_state_dict(plain_heads.random_state("mar"), dtype=torch.float32)
    change, message = refusals()[case]
    arguments = {"cond": torch.zeros(4, 7), "solver": flow_euler_up(2), "null_cond": None, **change}
    with pytest.raises(ValueError, match=message):
        head.sample(arguments.pop("cond"), **arguments)


def test_evaluation_and_embedding_refuse():
    head = DiffusionHead.from_state_dict(plain_heads.random_state("mar"), dtype=torch.float32)
    x, c = torch.zeros(4, 5), torch.zeros(4, 7)
    with pytest.raises(ValueError, match=r"__call__: expected x \[B, 5\].*got \[4, 6\]"):
        head(torch.zeros(4, 6), 1.0, c)
    with pytest.raises(ValueError, match=r"__call__: expected condition \[4, 7\].*got \[3, 7\]"):
        head(x, 1.0, c[:3])
    with pytest.raises(ValueError, match=r"__call__: expected t \[4, ...\] or a number, got \[3\]"):
        head(x, torch.zeros(3), c)
    with pytest.raises(ValueError, match=r"project: expected a condition \[..., 7\].*got \[4, 5\]"):
        head.project(x)
    pocket = DiffusionHead.from_state_dict(plain_heads.random_state("pocket_tts"), dtype=torch.float32)
    for wrong in (torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 2, 1)):
        with pytest.raises(ValueError, match=r"time_embedding: expected timesteps \[S, 2\] for 2 time embedders"):
            pocket.time_embedding(wrong)
    with pytest.raises(ValueError, match=r"expected timesteps \[S, 2\]"):
        pocket.sample(c, solver=flow_euler_up(2))


@pytest.mark.needs_cuda
def test_devices_are_not_mixed():
    head = DiffusionHead.from_state_dict(plain_heads.random_state("mar"), dtype=torch.float32, device="cuda")
    with pytest.raises(ValueError, match=r"sample: expected cond on cuda:0, got it on cpu"):
        head.sample(torch.zeros(4, 7), solver=flow_euler_up(2))
