"""Reading a head from published files: safetensors (lazily), shards with an index, torch.save dicts; and bad ones."""

import argparse
import json
import shutil

import plain_heads
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from fastlatent.heads import diffusion_head
from fastlatent.heads.diffusion_head import DiffusionHead


@pytest.fixture
def state():
    head = {"model.prediction_head." + name: t.float() for name, t in plain_heads.random_state("vibevoice").items()}
    return {"model.language_model.embed_tokens.weight": torch.full((6, 4), torch.nan), **head}


def same(head, state):
    want = DiffusionHead.from_state_dict(state)
    assert head.spec == want.spec
    pairs = zip(head.weights.tensors(), want.weights.tensors(), strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    return True


def test_one_file_and_its_folder(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    assert same(DiffusionHead.from_pretrained(tmp_path / "model.safetensors"), state)
    assert same(DiffusionHead.from_pretrained(str(tmp_path)), state)
    head = DiffusionHead.from_pretrained(tmp_path, "vibevoice", dtype=torch.bfloat16, device="cpu")
    assert head.weights.dtype == torch.bfloat16
    # The file is closed again: it can go.
    shutil.rmtree(tmp_path)
    assert bool(torch.isfinite(head.project(torch.zeros(12))).all())


def test_shards_with_an_index(tmp_path, state):
    names = list(state)
    parts = {"model-00001.safetensors": names[::2], "model-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    save_file({"stray": torch.zeros(1)}, tmp_path / "other.safetensors")
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(DiffusionHead.from_pretrained(tmp_path), state)
    (tmp_path / "model-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002.safetensors, which its index names"):
        DiffusionHead.from_pretrained(tmp_path)
    for wrong in ("[]", "{}", '{"weight_map": 3}', "{", '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"model.safetensors.index.json is not an index"):
            DiffusionHead.from_pretrained(tmp_path)


def test_only_the_heads_tensors_are_read(tmp_path, state, monkeypatch):
    save_file(state, tmp_path / "model.safetensors")
    read = []

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = safetensors.safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return self.file.get_slice(name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(diffusion_head, "safe_open", Spy)
    DiffusionHead.from_pretrained(tmp_path)
    assert set(read) == {name for name in state if "prediction_head" in name}


def test_pickled_files(tmp_path):
    mar = {"diffloss.net." + name: t.float() for name, t in plain_heads.random_state("mar").items()}
    averaged = {name: 0.5 * t for name, t in mar.items()}
    torch.save(mar, tmp_path / "plain.pt")
    assert same(DiffusionHead.from_pretrained(tmp_path / "plain.pt"), mar)
    # MAR's checkpoint: weights, their average, optimizer and command line.
    published = {"model": mar, "model_ema": averaged, "epoch": 3, "args": argparse.Namespace(lr=1e-4, blr=None)}
    torch.save(published, tmp_path / "checkpoint-last.pth")
    assert same(DiffusionHead.from_pretrained(tmp_path / "checkpoint-last.pth"), averaged)
    # Lightning's, in which SynthLM is published.
    synthlm = {"model." + name: t.float() for name, t in plain_heads.random_state("synthlm").items()}
    torch.save({"state_dict": synthlm, "global_step": 5}, tmp_path / "last.ckpt")
    assert DiffusionHead.from_pretrained(tmp_path / "last.ckpt").spec.family == "synthlm"


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_pickles_run_no_code(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(
        ValueError, match=r"evil.pth does not load with weights_only=True .UnpicklingError.; save its state dict"
    ):
        DiffusionHead.from_pretrained(tmp_path / "evil.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_files_that_are_no_checkpoint(tmp_path, state):
    expected = r"expected a .safetensors, .pt, .pth or .ckpt file, or a folder"
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nothing.pth", tmp_path / "nothing.safetensors"):
        with pytest.raises(ValueError, match=expected):
            DiffusionHead.from_pretrained(path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=expected):
        DiffusionHead.from_pretrained(tmp_path / "pytorch_model.bin")
    for broken in (b"", b"x" * 100):
        for name in ("broken.safetensors", "broken.pth"):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(ValueError, match=rf"{name} does not load"):
                DiffusionHead.from_pretrained(tmp_path / name)
    (tmp_path / "broken.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(state, tmp_path / name)
    with pytest.raises(ValueError, match=r"got .*2 .safetensors files"):
        DiffusionHead.from_pretrained(tmp_path)
    # A file that was cut off: safetensors checks its length.
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"a.safetensors does not load"):
        DiffusionHead.from_pretrained(tmp_path / "a.safetensors")


def test_dicts_that_hold_no_tensors():
    with pytest.raises(ValueError, match=r"from_state_dict: expected tensors by name, got 'state_dict': dict"):
        DiffusionHead.from_state_dict({"state_dict": {}})
    with pytest.raises(ValueError, match=r"expected tensors by name, got 3: Tensor"):
        DiffusionHead.from_state_dict({3: torch.zeros(1)})


def test_pickled_list(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"expected a state dict in .*list.pt, got list"):
        DiffusionHead.from_pretrained(tmp_path / "list.pt")
