import copy
import pickle

import pytest

from fastlatent.patches.handle import PatchHandle
from fastlatent.patches.patch import patch


class Model:
    def __init__(self):
        self.value = 1
        self.inner = Inner()

    def sample(self, x):
        """Theirs."""
        return x + self.value


class Inner:
    def step(self):
        return "theirs"


def other(x):
    return x * 100


def patched(model):
    handle = PatchHandle(model, "toy")
    handle.replace(model, "sample", lambda x: -x)
    handle.replace(model.inner, "step", lambda: "ours", "inner")
    return handle


def test_undo_gives_everything_back():
    model = Model()
    before, inner = dict(vars(model)), dict(vars(model.inner))
    handle = patched(model)
    assert (model.sample(3), model.inner.step(), model.sample.__doc__) == (-3, "ours", "Theirs.")
    assert handle.replaced == ["sample", "inner.step"]
    assert repr(handle) == "PatchHandle(toy: sample, inner.step)"
    assert Model().sample(3) == 4  # the class is as it was
    handle.undo()
    handle.undo()
    assert (model.sample(3), vars(model), vars(model.inner)) == (4, before, inner)


def test_a_method_of_the_instance_comes_back():
    model = Model()
    model.sample = other
    with patched(model):
        assert model.sample(3) == -3
        assert copy.deepcopy(model).sample(3) == 300
        assert pickle.loads(pickle.dumps(model)).sample(3) == 300
    assert model.sample is other


def test_with_undoes_after_an_exception():
    model = Model()
    before = dict(vars(model))
    with pytest.raises(RuntimeError, match="inside"), patched(model):
        raise RuntimeError("inside")
    assert vars(model) == before


def test_twice_is_refused():
    model = Model()
    with patched(model):
        with pytest.raises(ValueError, match=r"not patched.*toy: sample.*undo that first"):
            patched(model)
        assert model.sample(3) == -3  # the first stays
    with patched(model):
        assert model.sample(3) == -3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own_methods(duplicate):
    model = Model()
    with patched(model):
        clone = duplicate(model)
        clone.value = 7
        assert (clone.sample(3), clone.inner.step(), model.sample(3)) == (10, "theirs", -3)
        with patched(clone):
            assert clone.sample(3) == -3
        assert duplicate(clone).sample(3) == 10


def test_an_unknown_model_or_family():
    with pytest.raises(ValueError, match=r"of a known family, got Model\n(.|\n)*vibevoice: (.|\n)*latentlm: "):
        patch(Model())
    with pytest.raises(ValueError, match="family of vibevoice.*got 'gpt'"):
        patch(Model(), family="gpt")
