"""Every objective: 2 processes (gloo, float64) train as 1 does, and a run may change between them."""

import random

import pytest
import toy_training as toy
from objectives64 import COMMANDS, STEPS

from fastlatent.pipeline.checkpoints import checkpoints, step_of

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teams):
    folder = tmp_path_factory.mktemp("objectives")
    teams.run(1, "objectives64:make_data", folder=str(folder))
    return folder


@pytest.fixture(scope="module", params=COMMANDS)
def whole(request, folder, teams):
    name = request.param
    teams.run(1, "objectives64:run_one", name=name, folder=str(folder), out=f"{name}-1")
    return name


# The chain below has two processes too: here the whole of a run, of the one with batch statistics and of one without.
@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_two_processes_are_one(folder, teams, whole, everywhere):
    if (whole in ("vae", "ar")) == everywhere:
        pytest.skip("in the other half")
    teams.run(2, "objectives64:run_one", name=whole, folder=str(folder), out=f"{whole}-2")
    toy.assert_same(folder / f"{whole}-1", folder / f"{whole}-2", TOLERANCE)


def test_one_then_two_then_one(folder, teams, whole):
    out = f"{whole}-121"
    for world, stop in ((1, 2), (2, 5), (1, None)):
        teams.run(world, "objectives64:run_one", name=whole, folder=str(folder), out=out, stop_at=stop)
    toy.assert_same(folder / f"{whole}-1", folder / out, TOLERANCE)


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.parametrize(("world", "flags"), [(1, ["--accumulate", "2"]), (2, ["--fsdp"])], ids=["parts", "fsdp"])
def test_parts_and_shards_are_the_whole(folder, teams, whole, world, flags, everywhere):
    if whole == "vae" or (whole == "dit") == everywhere:
        pytest.skip("parts of a batch have batch statistics of their own, shards are refused; or in the other half")
    out = whole + flags[0]
    teams.run(world, "objectives64:run_one", name=whole, folder=str(folder), out=out, more=flags)
    toy.assert_same(folder / f"{whole}-1", folder / out, TOLERANCE)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_cuda_is_the_cpu(folder, teams, whole, compiled):
    if compiled == "on" and whole not in ("ar", "ddpm"):
        pytest.skip("compiling takes a minute each")
    out, flags = f"{whole}-cuda-{compiled}", ["--device", "cuda", "--compile", compiled]
    teams.run(1, "objectives64:run_one", name=whole, folder=str(folder), out=out, more=flags)
    toy.assert_same(folder / f"{whole}-1", folder / out, TOLERANCE)


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_kills_change_nothing(folder, teams, whole, kills):
    if kills == 3 and whole != "vae":
        pytest.skip("in make soak; what a crash leaves is the loop's, which the toy is crashed in")
    draw, amid, number = random.Random(7), 0, 0
    for kill in range(kills):
        out = f"{whole}-killed-{kills}-{number}"
        common = {"name": whole, "folder": str(folder), "out": out, "more": ["--checkpoint-every", "1"]}
        # The log is written as training begins; six steps and their checkpoints take about half a second.
        log = str(folder / out / "log.jsonl")
        teams.run(1, "objectives64:run_one", kill_after=draw.uniform(0.0, 0.4), kill_from=log, **common)
        steps = max(map(step_of, checkpoints(folder / out)), default=0)
        amid += 0 < steps < STEPS
        if steps == STEPS or kill == kills - 1:
            teams.run(1, "objectives64:run_one", **common)
            toy.assert_same(folder / f"{whole}-1", folder / out)
            number += 1
    assert amid >= kills // 5, "most kills came before the first checkpoint or after the last step"
