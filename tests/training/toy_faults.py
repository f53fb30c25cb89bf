"""Teams of the toy in which something happens to one process."""

import os
import signal
from pathlib import Path

import toy_training as toy

from fastlatent.pipeline import checkpoints
from fastlatent.training.loop import train
from fastlatent.training.team import Team


def stop_in_one(folder, rank):
    """SIGTERM comes to one process alone."""
    team = Team(toy.CPU)
    objective = toy.ToyObjective(team)
    if team.rank == rank:
        toy.at_step(objective, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        _train(objective, folder, team)
    except KeyboardInterrupt:
        return
    raise AssertionError("it went on")


def no_space(folder):
    """The main process cannot write its second checkpoint."""
    team = Team(toy.CPU)
    original = checkpoints.save

    def save(run, step, write, keep):
        if step == 8:
            raise OSError("no space left")
        return original(run, step, write, keep)

    checkpoints.save = save
    try:
        _train(toy.ToyObjective(team), folder, team)
    except (OSError, ValueError) as error:
        assert "no space left" in str(error)
        both = team.accelerator.reduce(toy.torch.ones(()))
        if both == 2:
            print("both stopped")


def not_sharded(folder):
    """--fsdp for a model without blocks."""
    team = Team(toy.CPU)
    objective = toy.ToyObjective(team)
    objective.blocks = ()
    try:
        train(objective, Path(folder), toy.settings(fsdp=True), team)
    except ValueError as error:
        print(error)


def _train(objective, folder, team):
    Path(folder).mkdir(exist_ok=True)
    train(objective, Path(folder), toy.settings(), team)
