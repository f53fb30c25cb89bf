"""Teachers of others: functions from a clip to tokens, by entry point or as "module:function"."""

import hashlib
import importlib.metadata
import sys
import types

import numpy as np
import pytest
import torch

from fastlatent.encoders.engines.engine import open_engine
from fastlatent.encoders.engines.numerics import fix_numerics, relative_error
from fastlatent.encoders.teachers import load_teacher
from fastlatent.encoders.token_readout import MEAN, Readout

CLIP = (4, 32, 32)


def clips_of(batch=2, clip=CLIP, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *clip, 3), dtype=torch.uint8, generator=draw)


def encoded(teacher, clips):
    return teacher.encode(teacher.prepare(clips))


class Mean:
    """Tokens [T, 3]: the mean colour of each frame."""

    def __init__(self, **attributes):
        self.calls = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, pixels):
        self.calls.append(tuple(pixels.shape))
        return pixels.mean((-1, -2)).transpose(-1, -2)


@pytest.fixture
def offered(monkeypatch):
    """Make `function` the teacher of the entry point "mean" and of "toy_module:make"."""

    def offer(function, count=1):
        module = types.ModuleType("toy_module")
        module.make = function if isinstance(function, Factory) else Factory(function)
        monkeypatch.setitem(sys.modules, "toy_module", module)
        dist = types.SimpleNamespace(name="toy-package", version="1.2")

        class Entry:
            name, value = "mean", "toy_module:make"
            load = staticmethod(lambda: module.make)

        Entry.dist = dist

        def entry_points(group):
            assert group == "fastlatent.teachers"
            return [Entry()] * count

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        return module.make

    return offer


class Factory:
    def __init__(self, function):
        self.function, self.given = function, None

    def __call__(self, weights, device, dtype):
        self.given = weights, device, dtype
        return self.function


@pytest.mark.parametrize("batched", [False, True])
def test_a_function_by_entry_point(offered, tmp_path, batched):
    function = Mean(clip=(2, 4, 6), mean=[0.5, 0.5, 0.5], std=[0.5, 0.25, 0.5], identity=lambda: {"v": 3})
    function.batched = batched
    factory = offered(function)
    file = tmp_path / "w.bin"
    file.write_bytes(b"weights")
    teacher = load_teacher(
        "mean", str(file), dtype=torch.bfloat16, pool="all", project_to=2, token_norm="layer", seed=5
    )
    assert factory.given == (str(file), torch.device("cpu"), torch.bfloat16)
    assert teacher.clip == (2, 4, 6) and teacher.row_shape(2, 4, 6) == (1, 2) and teacher.payload == "tokens"
    clips = clips_of(3, (2, 4, 6))
    function.calls.clear()
    rows = encoded(teacher, clips)
    assert function.calls == ([(3, 3, 2, 4, 6)] if batched else [(3, 2, 4, 6)] * 3)
    frames = (clips.double() / 255 - 0.5) / torch.tensor([0.5, 0.25, 0.5])
    want = Readout(3, None, token_norm="layer", pool="all", project_to=2, seed=5)(frames.mean((2, 3)))
    assert rows.dtype == torch.float32 and relative_error(rows, want) < 1e-5
    identity = teacher.identity()
    assert identity["own"] == {"v": 3} and identity["projection"]["to"] == 2 and identity["std"] == [0.5, 0.25, 0.5]
    assert (identity["name"], identity["distribution"], identity["version"]) == ("mean", "toy-package", "1.2")
    file.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="it changed since it was loaded"):
        teacher.upcast()
    with pytest.raises(ValueError, match=r"\(T, H, W\) = \(2, 4, 6\) only, got \(2, 4, 8\)"):
        teacher.row_shape(2, 4, 8)


def test_a_function_by_module_takes_clips_of_any_shape(offered):
    factory = offered(Mean())
    teacher = load_teacher("toy_module:make")
    assert factory.given == (None, torch.device("cpu"), torch.float32)
    assert teacher.clip is None and teacher.row_shape(2, 4, 4) == (2, 3) and teacher.row_shape(5, 8, 4) == (5, 3)
    identity = teacher.identity()
    assert identity["name"] == "toy_module:make" and identity["source"] is None and identity["clip"] is None
    assert "weights" not in identity and identity["mean"] == list(MEAN)
    assert load_teacher("toy_module:make", "a/model").identity()["weights"] == "a/model"
    assert torch.equal(encoded(teacher.upcast(), clips_of()), encoded(teacher, clips_of()))


def test_where_a_function_comes_from(tmp_path, monkeypatch):
    file = tmp_path / "own_teachers.py"
    file.write_text("def make(weights, device, dtype):\n    return lambda pixels: pixels[0, 0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = load_teacher("own_teachers:make").identity()
    assert told["source"] == hashlib.sha256(file.read_bytes()).hexdigest()  # of no package: the file itself
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"own_teachers": ["numpy"]})
    told = load_teacher("own_teachers:make").identity()
    assert (told["distribution"], told["version"]) == ("numpy", np.__version__) and "source" not in told
    monkeypatch.delitem(sys.modules, "own_teachers")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda pixels: [1.0], r"expected floating point tokens \[N, D\] on cpu, it gave list"),
        (lambda pixels: pixels, r"it gave float32 \[3, 4, 32, 32\] on cpu"),
        (lambda pixels: pixels[0, 0].long(), r"it gave int64 \[32, 32\]"),
        (lambda pixels: pixels[0, 0].to("meta"), r"on meta"),
        (lambda pixels: pixels[0, 0, :0], r"it gave float32 \[0, 32\]"),
        (lambda pixels: pixels[0, : 2 + int(pixels.max() > 0), :, 0], r"tokens \[2, 32\] on cpu, it gave .* \[3, 32\]"),
        (Mean(batched=True, clip=(2, 4)), r"expected three numbers as its clip, got \(2, 4\)"),
        (Mean(clip=(2, 4, 0)), r"expected clip and std above 0"),
        (Mean(mean=(0.1, "a", 0.1)), r"expected three numbers as its mean"),
        (7, r"expected a factory of a callable, it gave int"),
    ],
)  # fmt: skip
def test_functions_that_are_no_teachers(offered, function, message):
    offered(function)
    with pytest.raises(ValueError, match=message):
        # The sixth gives another number of tokens for what is not black.
        encoded(load_teacher("mean"), clips_of(2, CLIP))


def test_a_batched_function_that_loses_a_clip(offered):
    function = Mean(clip=CLIP)
    function.batched = True
    offered(function)
    teacher = load_teacher("mean")
    teacher._function = lambda pixels: function(pixels)[1:]
    with pytest.raises(ValueError, match=r"tokens \[2, 4, 3\] on cpu, it gave float32 \[1, 4, 3\]"):
        encoded(teacher, clips_of())


def _fail(*_):
    return {}["a key"]


class _FailingFactory(Factory):
    __call__ = _fail


def test_what_a_teacher_raises_is_told_as_its_own(offered):
    place = r"\(.*test_teacher_functions.py, line \d+; with FASTLATENT_TRACEBACK=1"
    for function in (_FailingFactory(None), _fail, Mean(clip=CLIP, identity=_fail)):
        offered(function)
        with pytest.raises(ValueError, match=f"--teacher mean: KeyError: 'a key' {place}"):
            load_teacher("mean").row_shape(*CLIP)
            load_teacher("mean").identity()

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    offered(full)
    with pytest.raises(torch.OutOfMemoryError):  # of which the command says what to do
        load_teacher("mean").row_shape(*CLIP)
    offered(Mean(clip=CLIP, identity=lambda: {"weights": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"mean: expected identity\(\) to give a dict for JSON, got .*tensor"):
        load_teacher("mean").identity()


def test_what_functions_cannot(offered):
    offered(Mean())
    with pytest.raises(ValueError, match="--layer 1: teacher mean gives the tokens that it gives"):
        load_teacher("mean", layer=1)
    with pytest.raises(ValueError, match=r"give the callable an attribute clip = \(T, H, W\)"):
        load_teacher("mean", project_to=2)
    with pytest.raises(ValueError, match="--pool space: which tokens are of one time step is not known"):
        load_teacher("mean", pool="space").row_shape(*CLIP)
    for name, message in (
        ("toy_module:other", "toy_module does not give it: AttributeError"),
        ("no_such_module:make", "no_such_module does not give it: ModuleNotFoundError"),
        ("toy_module:__name__", "expected a function that makes the teacher, got str"),
        ("other", r"an entry point of fastlatent.teachers \(mean\) or MODULE:FUNCTION, got 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_teacher(name)
    offered(Mean(), count=2)
    with pytest.raises(ValueError, match="several packages offer one of this name: toy-package, toy-package"):
        load_teacher("mean")


def test_functions_run_eagerly_only(tmp_path, offered):
    fix_numerics()
    offered(Mean())
    teacher, pixels = load_teacher("mean"), torch.rand(2, 3, *CLIP)
    engine = open_engine("eager", teacher, shapes=((2, 3, *CLIP),), cache=tmp_path)
    assert torch.equal(engine.encode(pixels), teacher.encode(pixels))
    with pytest.raises(ValueError, match="a function runs with --engine eager only"):
        open_engine("compile", teacher, shapes=((2, 3, *CLIP),), cache=tmp_path)
