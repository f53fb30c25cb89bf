"""Over every setting of encode: what changes bytes is refused by name, what does not is taken without a word."""

import dataclasses
import shutil

import pytest
import torch
from chain_helpers import other_vae

from fastlatent.config import EncodeConfig
from fastlatent.store.reader import Dataset

# Setting -> another value, and what the refusal calls it.
CHANGES = {
    "vae": (lambda chain, tmp: other_vae(chain, tmp / "vae"), "vae.weights"),
    "size": ("16", "transform.size"),
    "mirror": (None, "mirror"),
    "payload": ("latents", "payload"),
    "dtype": ("float32", "storage_dtype"),
    "compute_dtype": ("bfloat16", "engine.dtype"),
    "batch_size": ("3", "engine.batch_size"),
    "threads": ("2", "engine.threads"),
}
KEEPS = {
    "source": lambda chain, tmp: shutil.copytree(chain.images, tmp / "moved"),
    "vae": lambda chain, tmp: shutil.copytree(chain.vae, tmp / "copied"),  # the same weights elsewhere
    "out": None,  # below: the dataset itself is a copy
    "unit_rows": "5",
    "device": "cpu",
}


def test_every_setting_is_one_or_the_other():
    assert set(CHANGES) | set(KEEPS) == {field.name for field in dataclasses.fields(EncodeConfig)}
    assert set(CHANGES) & set(KEEPS) == {"vae"}  # its weights count, its place does not


def again(chain, tmp_path, out, name, value):
    arguments = {"source": chain.images, "vae": chain.vae}
    more = ""
    if callable(value):
        value = value(chain, tmp_path)
    if name in arguments:
        arguments[name] = value
    elif name != "out":
        more = f"--{name.replace('_', '-')} {value or ''}"
    return chain.command(
        f"encode {chain.encode} {more} --out", out, "--vae", arguments["vae"], arguments["source"]
    )  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_bytes_is_refused(chain, tmp_path, name):
    out = chain.copy("latents", tmp_path / "latents")
    before = chain.contents(out)
    value, called = CHANGES[name]
    done = again(chain, tmp_path, out, name, value)
    assert done.code == 1 and f"\n  {called}: " in done.err and "encode into another folder" in done.err
    # Nothing else is named, and nothing was touched.
    assert done.err.count("(now)") == 1
    assert chain.contents(out) == before


@pytest.mark.parametrize("name", KEEPS)
def test_what_changes_no_byte_is_taken(chain, tmp_path, name):
    out = chain.copy("latents", tmp_path / "latents")
    before = {path: data for path, data in chain.contents(out).items() if path.endswith(".safetensors")}
    done = again(chain, tmp_path, out, name, KEEPS[name])
    assert done.code == 0 and "0 files encoded now" in done.out
    after = {path: data for path, data in chain.contents(out).items() if path.endswith(".safetensors")}
    shards = {path for path in before if path.startswith("shards/")}
    assert {path for path in after if path.startswith("shards/")} == shards
    assert all(after[path] == before[path] for path in shards)


def test_another_number_of_rows_per_shard_gives_the_same_rows(chain, tmp_path):
    rows = []
    for unit_rows in (3, 5):
        out = tmp_path / str(unit_rows)
        chain.ok(f"encode {chain.encode} --unit-rows {unit_rows} --out", out, "--vae", chain.vae, chain.images)
        dataset = Dataset.open(out)
        places = zip(dataset.shard.tolist(), dataset.row.tolist(), strict=True)
        rows.append([dataset.open_shard(shard).columns["moments"][row].copy() for shard, row in places])
    assert all(torch.equal(*map(torch.from_numpy, pair)) for pair in zip(*rows, strict=True))
