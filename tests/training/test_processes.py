"""Every objective: 2 processes (gloo, float64) train as 1 does, and a run may change between them."""

import random

import pytest
import toy_training as toy
from objectives64 import COMMANDS

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


def test_two_processes_are_one(folder, teams, whole):
    teams.run(2, "objectives64:run_one", name=whole, folder=str(folder), out=f"{whole}-2")
    toy.assert_same(folder / f"{whole}-1", folder / f"{whole}-2", TOLERANCE)


def test_one_then_two_then_one(folder, teams, whole):
    for world, stop in ((1, 3), (2, 5), (1, None)):
        teams.run(world, "objectives64:run_one", name=whole, folder=str(folder), out=f"{whole}-121", stop_at=stop)
    toy.assert_same(folder / f"{whole}-1", folder / f"{whole}-121", TOLERANCE)


def test_accumulated_parts_are_the_batch(folder, teams, whole):
    if whole == "vae":
        pytest.skip("the discriminator's batch statistics are those of a part")
    more = ["--accumulate", "2"]
    teams.run(1, "objectives64:run_one", name=whole, folder=str(folder), out=f"{whole}-parts", more=more)
    toy.assert_same(folder / f"{whole}-1", folder / f"{whole}-parts", TOLERANCE)


def test_sharded_weights_are_whole_weights(folder, teams, whole):
    if whole == "vae":
        pytest.skip("it is refused")
    more = ["--fsdp"]
    teams.run(2, "objectives64:run_one", name=whole, folder=str(folder), out=f"{whole}-fsdp", more=more)
    toy.assert_same(folder / f"{whole}-1", folder / f"{whole}-fsdp", TOLERANCE)


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_kills_change_nothing(folder, teams, whole, kills, tmp_path):
    if kills == 3 and whole != "vae":
        pytest.skip("in make soak; the toy's crashes are the loop's")
    # A process that is forked and left alone is done after about 2 s.
    draw = random.Random(7)
    for _ in range(kills):
        teams.run(
            1, "objectives64:run_one", kill_after=draw.uniform(0.1, 2.0), name=whole, folder=str(folder),
            out=f"{whole}-killed-{kills}", more=["--checkpoint-every", "1"],
        )  # fmt: skip
    teams.run(1, "objectives64:run_one", name=whole, folder=str(folder), out=f"{whole}-killed-{kills}")
    toy.assert_same(folder / f"{whole}-1", folder / f"{whole}-killed-{kills}")
