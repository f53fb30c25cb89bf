import argparse
import shlex
import subprocess
import sys

import pytest
import torch

from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.weights import read_file, tensors_digest


def test_digest():
    def digest(**tensors):
        return tensors_digest(tensors)

    one = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    want = digest(a=one, b=one)
    assert digest(b=one.clone(), a=one.clone()) == want  # names are sorted
    assert digest(a=one.T.contiguous().T, b=one) == want  # layout in memory does not count
    for other in (
        digest(a=one, c=one),
        digest(a=one),
        digest(a=one.reshape(3, 2), b=one),
        digest(a=one.double(), b=one),
        digest(a=one.view(torch.int32), b=one),  # the same bytes as another dtype
        digest(a=-one, b=one),
        digest(a=one.nextafter(one + 1), b=one),
    ):
        assert other != want
    assert digest(a=torch.zeros(1)) != digest(a=-torch.zeros(1))  # 0.0 and -0.0 differ in a bit
    assert digest(a=torch.tensor(1.0)) != digest(a=torch.zeros(0))  # no dimension; no element
    assert len(digest(a=torch.ones(3, dtype=torch.bfloat16), b=torch.ones(2, dtype=torch.bool))) == 64


def test_a_file_that_needs_pickle_comes_with_the_command_that_rewrites_it(tmp_path):
    file = tmp_path / "a b.ckpt"
    weights = {"encoder.mid.weight": torch.arange(3.0)}
    torch.save({"state_dict": weights, "hyper_parameters": argparse.Namespace(lr=1.0), "epoch": 3}, file)
    with pytest.raises(ValueError, match=r"holds argparse.Namespace, which only pickle can load") as caught:
        load_autoencoder(file)
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True)
    state, config = read_file(file)
    assert config is None
    assert state.keys() == weights.keys()
    assert torch.equal(state["encoder.mid.weight"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"", "does not load"),
        ("a.pt", b"PK\x03\x04 torn", "does not load"),
        ("a.safetensors", b"{}", "does not load"),
        ("a.pth", [1, 2], "expected a dict in .*, got list"),
        ("a.pth", {"epoch": 3}, "it holds 'epoch'"),
        ("a.bin", {"model": {"a": 1.0}}, 'below "model"'),
        ("a.bin", {"model": {"a": torch.ones(1)}, "config": 3}, 'expected a dict at "config" in .*, got int'),
        ("a.txt", b"", "got the file"),
    ],
)  # fmt: skip
def test_files_that_hold_no_weights(tmp_path, name, content, message):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message) as caught:
        load_autoencoder(file)
    assert str(file) in str(caught.value)
