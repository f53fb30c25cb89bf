"""The units of an encode as tasks of a Ray cluster: Ray schedules, retries and scales; the store keeps what is done."""

from __future__ import annotations

import importlib
import logging
import os
import uuid
from typing import Any

from fastlatent.config import EncodeConfig
from fastlatent.pipeline.progress import Progress
from fastlatent.store.records import Unit
from fastlatent.store.writer import DatasetWriter
from fastlatent.workflows.encode_open import set_up_encode
from fastlatent.workflows.encode_plan import open_writer, plan
from fastlatent.workflows.encode_setup import EncodeSetup
from fastlatent.workflows.encode_work import Work
from fastlatent.workflows.runtime import absolute_paths

RETRIES = 3  # of a task whose process or machine died; what it had not committed is done again
_open: dict[str, tuple[DatasetWriter, Work]] = {}  # in a Ray worker, which runs many tasks: of its newest `run_units`


def run_units(setup: EncodeSetup, units: list[Unit]) -> int:
    """Run every unit as one task on the cluster at RAY_ADDRESS, or on one that is started here; return the new rows.

    Units that other processes have or that tasks failed to finish are left to the caller.

    Raises:
        ValueError: no node is large enough; what a task raised.
    """
    ray = require_ray()
    config = absolute_paths(setup.config)  # workers have a working folder of their own
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS")
        ray.init(address=address, logging_level=logging.WARNING, **({} if address else {"include_dashboard": False}))
    try:
        cuda = setup.device.type == "cuda"
        needed = {"CPU": config.readers, "GPU": 1} if cuda else {"CPU": config.threads, "GPU": 0}
        nodes = [node["Resources"] for node in ray.nodes()]
        if not any(all(node.get(kind, 0) >= count for kind, count in needed.items()) for node in nodes):
            found = [{kind: node.get(kind, 0) for kind in needed} for node in nodes]
            raise ValueError(f"--cluster ray: expected a node with {needed}, got {found}: fewer --threads, or --device")
        task = ray.remote(max_retries=RETRIES, num_cpus=needed["CPU"], num_gpus=needed["GPU"])(_run_unit)
        call = uuid.uuid4().hex
        size = {task.remote(call, config, unit.id): len(unit.items) for unit in units}
        waiting, rows = list(size), 0
        with Progress("encode", sum(size.values()), setup.noun) as progress:
            while waiting:
                done, waiting = ray.wait(waiting)
                for one in done:
                    try:
                        rows += ray.get(one)
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause if isinstance(error.cause, (ValueError, OSError)) else error from None
                    except ray.exceptions.RayError as error:  # its worker died, and died again
                        print(f"left to this process: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                    progress.advance(size[one])
        return rows
    finally:
        if ours:
            ray.shutdown()  # its workers end, and with them their leases


def require_ray() -> Any:
    """The package ray.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ValueError("--cluster ray: expected the package ray: pip install 'fastlatent[ray]'") from None


def _run_unit(call: str, config: EncodeConfig, unit: str) -> int:
    """In a worker: one unit, unless it is done or another has it; the number of its rows."""
    if call not in _open:
        for writer, _ in _open.values():  # of a session that outlives the call, in which somebody else started Ray
            writer.__exit__(None, None, None)
        _open.clear()
        setup = set_up_encode(config)
        writer = open_writer(setup).__enter__()  # until this process ends, or the next call
        plan(setup, writer)
        _open[call] = writer, Work(setup, writer)
    _, work = _open[call]
    before = work.encoded
    work.run(0, only=unit)
    return work.encoded - before
