"""Seconds per optimiser step, with latents from a dataset on disk, against a loop written by hand.

fastlatent    `Trainer.step` and `Log.add`, as `fastlatent train ar | dit` runs them
plain         plain_train.py: the same layers, PyTorch, Accelerate, a DataLoader with worker processes
floor         forward, backward and AdamW of fastlatent on one batch that is on the device: no loader, no noise, no
              clipping, no average, no log
gemm          CUDA: as many FLOPs as the step has, in bfloat16 products of 8192³
loader-wait   seconds that the loader's `batch` takes in a fastlatent step, of the steps after those that it had
              prepared while the others ran

`fraction_of_floor` is against "gemm" on CUDA, which makes it the MFU of the measured GEMM rate; on the CPU against
"floor". `flops` are 2 × multiply-adds of products, forward and backward. All providers of a case train the same tensors
(weights, their average, AdamW's), so that a case fits where one training does; each has its own optimiser and code. A
call is several steps in a row.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import harness
import numpy as np
import rows as row_files
import torch
from plain_train import PlainLoop, Recipe
from rows import Case, Row
from store_costs import commit, open_writer
from torch.utils.flop_counter import FlopCounterMode

from fastlatent.config import TrainDitConfig
from fastlatent.data.latents import LatentDataset
from fastlatent.data.loader import LatentLoader
from fastlatent.models.checkpoint import AnyCheckpointConfig, CheckpointConfig, DiTCheckpointConfig
from fastlatent.models.dit import DiT, published_dit_size
from fastlatent.models.transformer import Transformer, published_size
from fastlatent.training.autoregressive import NextTokenLoss, NextTokenObjective
from fastlatent.training.dit import DitLoss, DitObjective
from fastlatent.training.latents import Batches, LatentBatches
from fastlatent.training.log import Log
from fastlatent.training.loop import AUTOCAST, LoopSettings, Trainer, schedule
from fastlatent.training.objective import Objective
from fastlatent.training.team import Team
from fastlatent.workflows.runtime import set_up

CUDA = torch.cuda.is_available()
COPIES = 4  # noised copies of each sequence, of a Transformer: the default
PREFETCH = 2  # the loaders' default
LEAD = PREFETCH + 1  # steps whose batches were prepared while other providers ran, and the one being prepared
COMPILE_SECONDS = 240.0  # 24 layers, forward and backward
SMALL_AR = {"hidden_size": 256, "depth": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_ratio": 4, "diffusion_depth": 3}
SMALL_DIT = {name: value for name, value in SMALL_AR.items() if name != "diffusion_depth"}


def model_config(name: str) -> AnyCheckpointConfig:
    """Published sizes: a Transformer on 16×16 latents of 16 channels, a DiT on 32×32 of 4 in patches of 2: 256 tokens.

    Small ones for the CPU have 64 tokens.
    """
    rest: dict[str, Any] = {"num_classes": 1000, "prediction_type": "v_prediction"}
    if name.startswith("Transformer"):
        small = name == "Transformer-small"
        sizes: dict[str, Any] = SMALL_AR if small else published_size(name)
        return CheckpointConfig(**sizes, in_channels=4 if small else 16, input_size=8 if small else 16, **rest)
    small = name == "DiT-small"
    sizes = SMALL_DIT if small else published_dit_size(name)
    return DiTCheckpointConfig(**sizes, in_channels=4, input_size=8 if small else 32, patch_size=2 - small, **rest)


# ---- cases -----------------------------------------------------------------------------------------------


def make_case(model: str, batch: int, compile: str, device: str) -> Case:
    providers = ("fastlatent", "plain", "floor", *(["gemm"] if device == "cuda" else []), "loader-wait")
    return Case(
        "train_step",
        {"batch": batch, "compile": compile, "model": model, "tokens": model_config(model).num_tokens},
        "bfloat16" if device == "cuda" else "float32",
        device,
        providers,
        threads=row_files.cpu_cores() if device == "cpu" else 1,
    )


def make_cases(device: str) -> list[Case]:
    if device == "cpu":
        return [
            make_case("Transformer-small", 4, "off", "cpu"),
            make_case("DiT-small", 8, "off", "cpu"),
            make_case("DiT-small", 8, "on", "cpu"),
        ]
    # Batches that fit 80 GB in eager mode.
    batches = {
        "Transformer-Large": 32, "DiT-XL": 32, "Transformer-Medium": 64, "Transformer-Base": 128, "DiT-Medium": 64,
    }  # fmt: skip
    return [make_case(model, batch, compile, "cuda") for compile in ("on", "off") for model, batch in batches.items()]


CASES = make_cases("cuda" if CUDA else "cpu")


def steps_per_call(device: str) -> int:
    return 10 if device == "cuda" else 6


def precision(case: Case) -> str:
    return "bf16" if case.dtype == "bfloat16" else "no"


# ---- what is trained: also of bench_train_source.py ------------------------------------------------------


def make_loss(config: AnyCheckpointConfig, device: torch.device) -> NextTokenLoss | DitLoss:
    """With random weights where training begins with zeros: a product of zeros costs less power, and so less time."""
    with torch.device(device):
        model = Transformer(config) if isinstance(config, CheckpointConfig) else DiT(config)
        model.initialize()
        for parameter in model.parameters():
            if device.type != "meta" and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        kind = NextTokenLoss if isinstance(model, Transformer) else DitLoss
        return kind(model, prediction_type=config.prediction_type, beta_schedule=config.beta_schedule)


def make_objective(config: AnyCheckpointConfig, batches: LatentBatches, device: torch.device) -> Objective:
    loss = make_loss(config, device)
    shared = {"flow_times": "uniform", "class_dropout_prob": 0.1}
    if isinstance(config, CheckpointConfig):
        return NextTokenObjective(batches, loss, config, batch_mul=COPIES, **shared)
    return DitObjective(batches, loss, config, **shared)


class Loop:
    """The loop of `fastlatent train`, some steps at a time."""

    def __init__(self, objective: Objective, config: TrainDitConfig, team: Team, folder: Path) -> None:
        values = {field.name: getattr(config, field.name) for field in fields(LoopSettings)}
        self.settings = LoopSettings(**values | {"compile": config.compile == "on"})
        self.trainer, self.log, self.next = Trainer(objective, self.settings, team), Log(folder, 0), 0

    def run(self, steps: int) -> None:
        for step in range(self.next, self.next + steps):
            rate = self.settings.learning_rate * schedule(self.settings, step)
            self.log.add(step, rate, self.trainer.step(step))
        self.next += steps


@functools.cache
def flops(model: str, batch: int) -> int:
    """Of forward and backward."""
    config = model_config(model)
    loss = make_loss(config, torch.device("meta"))
    tokens, side = config.num_tokens, config.input_size
    autoregressive = isinstance(config, CheckpointConfig)
    shape = (batch, tokens, config.in_channels) if autoregressive else (batch, config.in_channels, side, side)
    with torch.device("meta"):
        inputs = {
            "latents": torch.empty(shape),
            "noise": torch.empty(batch, COPIES, *shape[1:]) if autoregressive else torch.empty(shape),
            "label": torch.empty(batch, dtype=torch.int64),
            "t": torch.empty((batch, COPIES, tokens) if autoregressive else (batch,), dtype=torch.int64),
        }
        with FlopCounterMode(display=False) as counter:
            loss(inputs)[0].backward()
    return counter.get_total_flops()


# ---- train_step ------------------------------------------------------------------------------------------


class TimedLoader:
    """A loader that keeps how long each of its batches took."""

    def __init__(self, loader: Batches) -> None:
        self.loader = loader
        self.seconds: list[float] = []

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def batch(self, step: int) -> dict[str, Any]:
        begin = time.perf_counter()
        batch = self.loader.batch(step)
        self.seconds.append(time.perf_counter() - begin)
        return batch


def write_rows(folder: Path, count: int, config: AnyCheckpointConfig) -> None:
    """The same float16 moments as a dataset of ours (data) and as the files of `plain_train.Rows`."""
    bucket = (1, 2 * config.in_channels, config.input_size, config.input_size)
    values = np.random.default_rng(0).standard_normal((count, math.prod(bucket)), dtype=np.float32)
    moments = values.astype(np.float16).reshape(count, *bucket)
    moments[:, :, config.in_channels :] -= 4  # log-variances
    np.save(folder / "moments.npy", moments)
    np.save(folder / "labels.npy", np.zeros(count, np.int64))
    writer, units = open_writer(folder / "data", count, -(-count // 4), bucket)
    with writer:
        begin = 0
        for unit in units:
            commit(writer, unit, moments[begin : begin + len(unit.items)])
            begin += len(unit.items)
        writer.finish()


@contextmanager
def prepare(case: Case) -> Iterator[tuple[harness.Prepared, TimedLoader]]:
    """The providers, and the loader that "fastlatent" waits for."""
    device, batch, name = set_up(case.device, case.threads), int(case.sizes["batch"]), str(case.sizes["model"])
    config, steps = model_config(name), steps_per_call(case.device)
    torch.compiler.reset()
    gc.collect()  # the case before: compiled modules are in cycles
    if CUDA:
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="fastlatent-bench-") as work, contextlib.ExitStack() as stack:
        folder = Path(work)
        write_rows(folder, 16_384 if case.device == "cuda" else 1024, config)
        mean, std = torch.zeros(config.in_channels), torch.ones(config.in_channels)
        loader = LatentLoader(LatentDataset(folder / "data"), batch, device=device, prefetch=PREFETCH)
        stack.callback(loader.close)
        timed = TimedLoader(loader)
        objective = make_objective(config, LatentBatches(timed, mean=mean, std=std, seed=0), device)
        recipe = TrainDitConfig(
            latents="", out="", batch_size=batch, mixed_precision=precision(case), compile=str(case.sizes["compile"])
        )
        loop = Loop(objective, recipe, Team(device), folder)
        trainer, settings = loop.trainer, loop.settings
        adamw, autocast = trainer.optimisers[0].adamw, AUTOCAST.get(settings.mixed_precision)
        fixed = objective.batch(0)
        timed.seconds.clear()
        loop.next = 1  # the loader stands there

        def plain() -> Callable[[], None]:
            assert trainer.ema is not None
            by_hand = PlainLoop(
                objective.module.model,
                folder,
                Recipe(
                    batch=batch, copies=COPIES, class_dropout=0.1, null=config.num_classes,
                    learning_rate=recipe.learning_rate, betas=(recipe.adam_beta1, recipe.adam_beta2),
                    weight_decay=recipe.weight_decay, grad_clip=recipe.grad_clip, ema_decay=recipe.ema_decay,
                    compile=settings.compile, autocast=autocast,
                    workers=4 if case.device == "cuda" else 1,
                ),
                list(trainer.ema.shadow.values()),
            )  # fmt: skip
            by_hand.adamw.optimizer.state = adamw.state

            def run() -> None:
                for _ in range(steps):
                    by_hand.step()

            return run

        def floor() -> None:
            for _ in range(steps):
                with torch.autocast(
                    device.type, AUTOCAST.get(settings.mixed_precision), enabled=case.dtype != "float32"
                ):
                    loss, _ = objective.module(fixed)
                loss.backward()
                adamw.step()
                objective.module.zero_grad(set_to_none=True)

        factories: dict[str, Callable[[], Callable[[], object]]] = {
            "fastlatent": lambda: lambda: loop.run(steps),
            "plain": plain,
            "floor": lambda: floor,
            "gemm": lambda: products(steps * flops(name, batch), device),
            "loader-wait": lambda: lambda: None,  # measured inside "fastlatent"
        }
        prepared = harness.Prepared(
            {name: factories[name] for name in case.providers},
            flops=flops(name, batch),
            floor="gemm" if "gemm" in case.providers else "floor",
            rivals=("plain",),
            units=steps,
        )
        yield prepared, timed


def products(flops: int, device: torch.device) -> Callable[[], object]:
    """So many FLOPs in bfloat16 products of 8192³."""
    side = 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    whole, rest = divmod(flops, 2 * side**3)
    last = left[: max(1, round(rest / (2 * side**2)))]

    @torch.inference_mode()
    def run() -> None:
        for _ in range(whole):
            left @ right
        last @ right

    return run


def measure(case: Case, seconds: float) -> list[Row]:
    steps = steps_per_call(case.device)
    with prepare(case) as (prepared, timed):
        others = {name: factory for name, factory in prepared.providers.items() if name != "loader-wait"}
        outcomes = harness.interleave(
            others, device=case.device, min_seconds=seconds, cap_seconds=COMPILE_SECONDS, max_samples=40
        )
        waits = [wait for i, wait in enumerate(timed.seconds) if i % steps >= LEAD]
        found = harness.rows_of(case, prepared, outcomes | {"loader-wait": outcomes["fastlatent"]})
    ours = next(row for row in found if row.provider == "fastlatent")
    return [*(row for row in found if row.provider != "loader-wait"), _wait_row(case, ours, waits)]


def _wait_row(case: Case, ours: Row, waits: list[float]) -> Row:
    if ours.p50 is None:
        return harness.row(case, "loader-wait", harness.Outcome(ours.status, ours.reason))
    return harness.row(case, "loader-wait", harness.Outcome("ok", timing=harness.quantiles(waits)))


# ---- the command line ------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return harness.measure_all(CASES, measure, argv, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main()
