"""MAR (Li et al. 2024, LTH14/mar): DiffLoss.sample as one op.

What stays as published: the signature, the order and dtype of the random draws, the respacing of `gen_diffusion` (read
at each call, so it may be exchanged), guidance of epsilon alone, the variance of the conditional branch, the
temperature on each step's noise, float32 tokens.

What differs: coefficients and sinusoids are float64 where the published code rounds them to float32. With guidance the
published second half continues the null branch's rows with draws of their own, and every caller discards it; here it is
the first half again.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.diffusion.rows import ddpm_rows, shifted
from fastlatent.diffusion.solvers import SolverTable
from fastlatent.heads.diffusion_head import DiffusionHead
from fastlatent.ops.solver_step import S, solver_step_reference
from fastlatent.patches.fused_loop import prove
from fastlatent.patches.handle import PatchHandle
from fastlatent.patches.live_head import LiveHead

ARGUMENTS = ["z", "temperature", "cfg"]
NORM_EPS = 1e-6
# Published float32 coefficients: of two steps, from t = 999 where alpha is 5e-5, tokens are off by 4e-3.
PROOF_OF_LOOP = 0.02


def mismatch(model: Any) -> str:
    """ "" where the model has one DiffLoss that is MAR's, or is it; else what is missing or otherwise."""
    return found_mismatch(_found(model), "a module with net, gen_diffusion and sample, not called mar.diffloss")


def apply(model: Any, handle: PatchHandle) -> None:
    """Replace `sample` of the model's DiffLoss.

    Raises:
        ValueError: its weights are not those of MAR's head.
    """
    [(path, loss)] = _found(model).items()
    handle.replace(loss, "sample", sampler(loss), path)


def _found(model: Any) -> dict[str, Any]:
    return {path: loss for path, loss in diff_losses(model).items() if not inside_mar(path)}


def diff_losses(model: Any) -> dict[str, Any]:
    """Modules that look like a DiffLoss, by dotted path; "" is the model itself."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        path: module
        for path, module in model.named_modules()
        if "net" in module._modules and "gen_diffusion" in vars(module) and callable(getattr(module, "sample", None))
    }


def inside_mar(path: str) -> bool:
    """Whether a DiffLoss there is that of a MAR within another model, as Harmon has it."""
    return path.split(".")[-2:] == ["mar", "diffloss"]


def found_mismatch(found: dict[str, Any], wanted: str) -> str:
    """Why these are not one DiffLoss of MAR's."""
    if len(found) != 1:
        return f"expected {wanted}, got {', '.join(found) or 'none'}"
    [(path, loss)] = found.items()
    arguments = list(inspect.signature(loss.sample).parameters)
    if arguments != ARGUMENTS:
        where = path or type(loss).__name__
        return f"expected {where}.sample({', '.join(ARGUMENTS)}), got ({', '.join(arguments)})"
    return process_mismatch(loss.gen_diffusion) or adaln_mlp_mismatch(loss.net)


def process_mismatch(process: Any) -> str:
    """Why a diffusion process is not MAR's: epsilon with a learned range of variances, respaced."""
    for name, wanted in {"model_mean_type": "EPSILON", "model_var_type": "LEARNED_RANGE"}.items():
        kind = getattr(process, name, None)
        if getattr(kind, "name", None) != wanted:
            return f"expected gen_diffusion.{name} {wanted}, got {kind}"
    if getattr(process, "rescale_timesteps", False):
        return "expected gen_diffusion without rescale_timesteps, got it with"
    betas, kept = getattr(process, "betas", ()), getattr(process, "timestep_map", ())
    if len(betas) < 1 or len(betas) != len(kept):
        return f"expected gen_diffusion with as many betas as timestep_map, got {len(betas)} and {len(kept)}"
    return ""


def adaln_mlp_mismatch(net: nn.Module) -> str:
    """Why a SimpleMLPAdaLN is not the published one, in what its weights do not show: activations and norms."""
    modules = {path.removeprefix("_orig_mod."): module for path, module in net.named_modules()}  # of torch.compile
    blocks = [f"res_blocks.{i}." for i in range(len(modules.get("res_blocks") or ()))]
    activations = ["time_embed.mlp.1", "final_layer.adaLN_modulation.0"]
    for block in blocks:
        activations += [block + "mlp.1", block + "adaLN_modulation.0"]
    for path in activations:
        if type(modules.get(path)) is not nn.SiLU:
            return f"expected net.{path} to be SiLU, got {type(modules.get(path)).__name__}"
    for path in [*(block + "in_ln" for block in blocks), "final_layer.norm_final"]:
        norm, affine = modules.get(path), path != "final_layer.norm_final"
        if type(norm) is not nn.LayerNorm or norm.eps != NORM_EPS or norm.elementwise_affine != affine:
            kind = "an affine" if affine else "a plain"
            return f"expected net.{path} to be {kind} LayerNorm with eps {NORM_EPS:g}, got {norm}"
    if any(parameter.is_meta for parameter in net.parameters()):
        return "expected the weights of net in memory, got them on meta: load the head without offloading"
    return ""


class CastHead:
    """The head in the dtype that the model's own Linears run in: that of the weights, or autocast's.

    A model with float32 weights under autocast keeps two folded heads, one in each dtype. float64 is never cast.

    Args:
        owner: has the SimpleMLPAdaLN as `net`, and may be given another one.
        family: of `fastlatent.heads.spec.FAMILIES`.
        times: two times as the network is given them.
    """

    def __init__(self, owner: Any, family: str, times: Tensor) -> None:
        self._owner, self._times = owner, times
        self._live = LiveHead(lambda: owner.net, family, self._prove)

    def get(self) -> DiffusionHead:
        """Raises ValueError where `net` computes something else than a head of this family with its weights."""
        head = self._live.get()
        own, kind = head.weights.dtype, head.weights.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        return head if own in (dtype, torch.float64) else self._live.get(dtype)

    def _prove(self) -> None:
        """One evaluation against the module's."""
        net, head = self._owner.net, self._live.get()
        if wrong := adaln_mlp_mismatch(net):
            raise ValueError(f"patch: {wrong}")
        if not net.final_layer.linear.weight.any():
            return  # not trained yet: zeros, whatever the modules are
        weight, generator = net.input_proj.weight, torch.Generator().manual_seed(0)
        sizes = head.spec.channels, head.spec.condition_channels
        x, c = (torch.randn(2, size, generator=generator).to(weight) for size in sizes)
        times = self._times.to(weight if self._times.is_floating_point() else weight.device)
        forward = uncompiled(net, "forward")
        prove(lambda: forward(x, times, c), lambda: head(x, times, c), weight, "net")


def uncompiled(owner: Any, name: str) -> Callable[..., Tensor]:
    """A method; past NextStep's decorator for torch.compile, which keeps the `original`."""
    method = getattr(owner, name)
    original = getattr(method, "original", None)
    return method if original is None else functools.partial(original, owner)


class KnownHead:
    """In a head's place: outputs x + (1 - t/1000)² (cos t + the condition's first channel), and 0.2 for the variance.

    Near t = 1000 that is noise alone, as of a trained network: else x would grow until nothing else could be seen.
    """

    def __init__(self, head: DiffusionHead) -> None:
        self.spec, self.weights = head.spec, head.weights

    def get(self) -> KnownHead:
        return self

    def __call__(self, x: Tensor, t: Tensor, c: Tensor, cfg_scale: float = 1.0) -> Tensor:
        if cfg_scale != 1.0:
            x = x[: len(x) // 2].repeat(2, 1)  # the second half's own noise counts nowhere
        t = t.to(x)[:, None]
        output = x + (1 - t / 1000).square() * (t.cos() + c[:, :1].to(x))
        if cfg_scale != 1.0:
            cond, null = output.chunk(2)
            output = (null + cfg_scale * (cond - null)).repeat(2, 1)
        rest = output.new_full((len(x), self.spec.out_channels - self.spec.channels), 0.2)
        return torch.cat([output, rest], dim=1).to(self.weights.state_dtype)  # which the state takes on

    def sample(
        self, cond: Tensor, *, solver: SolverTable, noise: Tensor, step_noise: Tensor | None,
        null_cond: Any = (), guidance_scale: Any = (),
    ) -> Tensor:  # fmt: skip
        """As DiffusionHead.sample."""
        branches = [cond, *([null_cond] if isinstance(null_cond, Tensor) else null_cond)]
        scales = [*([guidance_scale] if isinstance(guidance_scale, float) else guidance_scale), 1.0]
        ways = [scales[0], *(after - before for before, after in itertools.pairwise(scales))]
        state = torch.zeros(4, *noise.shape, dtype=torch.float64, device=noise.device)
        state[0] = noise
        guidance = state.new_tensor(ways[: len(branches)])[:, None].expand(-1, len(noise))
        for k, (row, t) in enumerate(zip(solver.rows.to(state), solver.timesteps.to(state), strict=True)):
            output = torch.stack([self(state[0], t.expand(len(noise)), c) for c in branches])
            solver_step_reference(state, output, guidance, row, None if step_noise is None else step_noise[k])
        return state[0]


def prove_loop(
    owner: Any, head: DiffusionHead, ours: Callable[[KnownHead], Callable[..., Tensor]], ways: int, *args: Any
) -> None:
    """Hold owner.sample against our loop, both with a network whose outputs are known: whatever its code is, it shows.

    Args:
        ours: our sample with that head.
        ways: branches, of which the condition has two rows each.
        args: of both samples, after the condition.

    Raises:
        ValueError: they give other tokens, or owner.sample does not run here.
    """
    known, weight = KnownHead(head), owner.net.input_proj.weight
    rows, width = 2 * ways, head.spec.condition_channels
    c = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(weight.device)
    before, methods = dict(vars(owner.net)), ("forward", "forward_with_cfg")
    try:
        vars(owner.net).update(dict.fromkeys(methods, lambda x, t, c, cfg_scale=1.0: known(x, t, c, float(cfg_scale))))
        theirs, where = uncompiled(owner, "sample"), f"{type(owner).__name__}.sample"
        prove(lambda: theirs(c, *args)[:2], lambda: ours(known)(c, *args)[:2], c, where, PROOF_OF_LOOP)
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:  # MAR's own needs CUDA
        raise ValueError(f"patch: expected {where} to run on {weight.device}, got {error!r:.300}") from error
    finally:
        for name in methods:
            vars(owner.net).pop(name, None)
        vars(owner.net).update(before)


def sampler(loss: Any) -> Callable[..., Tensor]:
    """What takes the place of DiffLoss.sample.

    Raises:
        ValueError: its weights are not those of MAR's head, or its code does something else.
    """
    cast = CastHead(loss, "mar", torch.tensor([3, 700]))
    for ways, guidance in ((1, 1.0), (2, 1.5)):
        prove_loop(loss, cast.get(), functools.partial(_sample, loss), ways, 0.9, guidance)
    return _sample(loss, cast)


def _sample(loss: Any, cast: CastHead | KnownHead) -> Callable[..., Tensor]:
    def sample(z: Tensor, temperature: float = 1.0, cfg: float = 1.0) -> Tensor:
        head, scale = cast.get(), float(cfg)
        guided = scale != 1.0
        if guided and len(z) % 2:
            raise ValueError(f"DiffLoss.sample: expected z of conditional and null rows, got {len(z)} rows")
        batch, device = len(z) // 2 if guided else len(z), head.weights.device
        start = torch.randn(batch, head.spec.channels).to(device)  # drawn where torch draws by default
        solver = _table(loss.gen_diffusion, float(temperature))
        # The published loop draws for all rows, at every step, in its state's dtype: that of the start noise, then the
        # wider of it and the network's output.
        rows = start.new_empty(len(z), head.spec.channels)
        noise = torch.empty(len(solver.rows), *start.shape, dtype=head.weights.state_dtype, device=device)
        for step in noise:
            step.copy_(torch.randn_like(rows)[:batch])
            rows = rows.to(torch.promote_types(start.dtype, head.weights.state_dtype))
        with torch.autocast(device.type, enabled=False):
            if not guided:
                return head.sample(z, solver=solver, noise=start, step_noise=noise)
            token = head.sample(
                z[:batch], null_cond=z[batch:], guidance_scale=scale, solver=solver, noise=start, step_noise=noise
            )
        return torch.cat([token, token])

    return sample


def _table(process: Any, temperature: float) -> SolverTable:
    """The sampler of a diffusion process, made once for each respacing and temperature."""
    if wrong := process_mismatch(process):
        raise ValueError(f"DiffLoss.sample: {wrong}")
    betas = torch.as_tensor(process.betas, dtype=torch.float64)
    return _respaced(betas.numpy().tobytes(), tuple(process.timestep_map), temperature)


@functools.lru_cache(maxsize=64)
def _respaced(betas: bytes, kept: tuple[int, ...], temperature: float) -> SolverTable:
    """Ancestral sampling over the respaced betas, all noisy but the last step."""
    alpha_bar = torch.cumprod(1 - torch.frombuffer(bytearray(betas), dtype=torch.float64), 0).flip(0)
    timesteps = torch.tensor(kept, dtype=torch.float64).flip(0)
    rows = ddpm_rows(timesteps, alpha_bar, shifted(alpha_bar, 1.0), "epsilon", "learned_range")
    rows[:-1, S], rows[-1, S] = temperature, 0.0
    return SolverTable(rows, timesteps, f"respaced ddpm of a model (temperature {temperature:g}), {len(kept)} steps")
