"""verify, repair, stats, gc, merge, split and filter as commands, on a dataset that `encode` made."""

import numpy as np
import pytest
import yaml

from fastlatent.store.reader import Dataset
from fastlatent.store.rows import Rows
from fastlatent.store.statistics import LOGVAR_RANGE


def flip(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("shards/*/*")}


def test_verify(chain, tmp_path):
    latents = chain.copy("latents", tmp_path / "latents")
    assert "8 rows in 3 shards (headers; --full reads every byte): sound" in chain.ok("verify", latents).out
    assert "MiB read): sound" in chain.ok("verify --full --threads 2", latents).out
    dataset = Dataset.open(latents)
    flip(latents / dataset.shards[0].path)
    assert "sound" in chain.ok("verify", latents).out
    done = chain.command("verify --full", latents)
    assert done.code == 1
    key = dataset.key(int(np.flatnonzero((dataset.shard == 0) & (dataset.row == dataset.shards[0].rows - 1))[0]))
    assert f"{dataset.shards[0].path}: sample {key!r}: " in done.out
    assert "2 findings; `fastlatent repair` takes them out" in done.out
    assert done.err.count("Traceback") == 0
    assert "got no folder" in chain.command("verify", tmp_path / "none").message


def test_repair_and_encode_again(chain, tmp_path):
    latents = chain.copy("latents", tmp_path / "latents")
    before = shards(latents)
    assert "sound, nothing to repair" in chain.ok("repair", latents).out
    flip(latents / Dataset.open(latents).shards[1].path)
    done = chain.ok("repair", latents)
    assert "generation 2; 1 units are planned; rerun the same encode command" in done.out
    assert "3 samples no longer in the dataset" in done.out and "1 moved to damaged/" in done.out
    again = chain.ok(f"encode {chain.encode} --out", latents, "--vae", chain.vae, chain.images)
    assert "3 files encoded now" in again.out
    assert {name: data for name, data in shards(latents).items() if name in before} == before
    chain.ok("verify --full", latents)
    done = chain.ok("gc --dry-run", latents)
    assert "would be freed" in done.out and (latents / "damaged").exists()
    assert "freed" in chain.ok("gc", latents).out
    assert not (latents / "damaged").exists()
    chain.ok("verify --full", latents)


def test_encoded_again_every_bit_is_the_same(chain, tmp_path):
    done = chain.ok("verify --reencode 8", chain.latents)
    assert "8 encoded again and compared bit for bit: sound" in done.out
    # Elsewhere: other paths, and one file that is no longer what it was.
    images = chain.copy("images", tmp_path / "images")
    chain.image(99).save(images / "ant" / "0.png")
    done = chain.ok("verify --reencode 8 --vae", chain.vae, "--source", images, chain.latents)
    assert "7 encoded again and compared bit for bit, 1 skipped: their files changed: sound" in done.out


def test_encoded_again_another_value_is_found(chain, tmp_path):
    # A latent that was never what the autoencoder gives, behind right digests: only encoding it again can tell.
    from fastlatent.workflows import reencode

    latents = chain.copy("latents", tmp_path / "latents")

    def compared(dataset, i, made, tolerance):
        rows = None if made is None else Rows([dataset.key(i)], made[None])
        return reencode._compared(dataset, i, rows, None if made is None else 0, tolerance)

    dataset = Dataset.open(latents)
    stored = dataset.open_shard(int(dataset.shard[0])).columns["moments"][int(dataset.row[0])]
    assert compared(dataset, 0, stored.copy(), 0.0) is None
    other = stored.copy()
    other.flat[0] += 1
    assert "encoded again it gives other values: 1" in compared(dataset, 0, other, 0.0)
    assert compared(dataset, 0, (stored * np.float16(1.001)), 0.02) is None
    assert "relative error 0.1" in compared(dataset, 0, stored * np.float16(1.1), 0.02)
    assert "cannot be decoded" in compared(dataset, 0, None, 0.0)


def test_encoded_again_on_another_engine_is_compared_within_a_tolerance(chain, tmp_path, monkeypatch):
    from fastlatent.workflows.encode_setup import EncodeSetup

    made = EncodeSetup.provenance

    def elsewhere(setup):
        provenance = made(setup)
        provenance["informational"]["environment"]["torch"] = "another"
        return provenance

    monkeypatch.setattr(EncodeSetup, "provenance", elsewhere)
    done = chain.ok("verify --reencode 2", chain.latents)
    assert "compared within 0.02 (not the engine that wrote it): sound" in done.out


def test_what_cannot_be_encoded_again(chain, tmp_path):
    other = tmp_path / "other"
    chain.ok(f"train vae {chain.train_vae} --seed 7 --out", other, chain.images)
    done = chain.command("verify --reencode 1 --vae", other, chain.latents)
    assert "these latents cannot be made again with this:\n  vae." in done.message
    (tmp_path / "empty").mkdir()
    done = chain.command("verify --reencode 1 --source", tmp_path / "empty", chain.latents)
    assert "holds no image" in done.message
    chain.image(99).save(tmp_path / "empty" / "0.png")
    done = chain.command("verify --reencode 1 --source", tmp_path / "empty", chain.latents)
    assert "expected files as they were encoded, got 0 of 1 unchanged" in done.message
    done = chain.command("verify --reencode 1 --source", tmp_path / "none", chain.latents)
    assert "name it with --source PATH" in done.message


def two_pass(values):
    """Mean, std of the means, posterior variance, over everything but the first axis, in float64."""
    means, logvars = values
    mean = means.mean(axis=1)
    std = np.sqrt(np.square(means - mean[:, None]).mean(axis=1))
    return mean, std, np.exp(np.clip(logvars, *LOGVAR_RANGE)).mean(axis=1)


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("flags", ["", "--recompute", "--per bucket"])
def test_stats_equal_two_passes(chain, tmp_path, flags, removed):
    images, latents = chain.copy("images", tmp_path / "images"), tmp_path / "latents"
    chain.ok(f"encode {chain.encode} --mirror --out", latents, "--vae", chain.vae, images)
    if removed:  # a shard with a row that is no longer in use
        (images / "ant" / "1.png").unlink()
        chain.ok(f"encode {chain.encode} --mirror --out", latents, "--vae", chain.vae, images)
    out = chain.ok(f"stats {flags}", latents).out
    described = yaml.safe_load(out[out.index("path:") :])  # what stands before it are the settings
    dataset = Dataset.open(latents)
    places = zip(dataset.shard.tolist(), dataset.row.tolist(), strict=True)
    rows = [dataset.open_shard(shard).columns["moments"][row] for shard, row in places]
    values = np.stack(rows).astype(np.float64)  # [N, F, 2C, h, w]
    values = np.moveaxis(values, 2, 0).reshape(2, values.shape[2] // 2, -1)
    assert len(rows) == (7 if removed else 8)
    parts = [described, *described.get("buckets", [])]
    assert len(parts) == (2 if "bucket" in flags else 1)
    for part in parts:
        for shown, chosen in (
            (part["per channel"], values),
            (part["all channels"], values.reshape(2, 1, -1)),
        ):
            mean, std, variance = two_pass(chosen)
            for name, wanted in (
                ("latent mean", mean),
                ("std of the means", std),
                ("posterior variance", variance),
                ("latent std", np.sqrt(std**2 + variance)),
            ):
                scale = np.abs(chosen[0]).max()
                np.testing.assert_allclose(np.ravel(shown[name]), wanted, rtol=1e-12, atol=1e-13 * scale)
            for name, function in (("min", np.min), ("max", np.max)):
                assert np.ravel(shown[name]).tolist() == function(chosen[0], axis=1).tolist()
            assert shown["values"] == chosen.shape[-1]


def test_split_merge_filter(chain, tmp_path):
    done = chain.ok("split --fractions a=0.5,b=0.5 --seed 1 --out", tmp_path / "part", chain.latents)
    assert "part-a: " in done.out and "shared with their parents)" in done.out
    chain.ok("merge --out", tmp_path / "whole", tmp_path / "part-a", tmp_path / "part-b")
    whole, first = Dataset.open(tmp_path / "whole"), Dataset.open(chain.latents)
    assert [whole.key(i) for i in range(8)] == [first.key(i) for i in range(8)]
    assert whole.classes == first.classes
    (tmp_path / "keys").write_text("ant/0.png\n\nbee/3.png\n")
    chain.ok("filter --list", tmp_path / "keys", "--out", tmp_path / "two", chain.latents)
    two = Dataset.open(tmp_path / "two")
    assert [two.key(i) for i in range(2)] == ["ant/0.png", "bee/3.png"]
    conditions = "--classes ant bee --keys bee/* --min-size 20 --copy"
    done = chain.ok(f"filter {conditions} --out", tmp_path / "bees", chain.latents)
    assert "4 rows in" in done.out and "copied" in done.out
    for name in ("part-a", "part-b", "whole", "two", "bees"):
        chain.ok("verify --full", tmp_path / name)
    # What comes out trains like any other dataset.
    chain.ok(f"train ar {chain.train_ar} --out", tmp_path / "ar", tmp_path / "bees")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("split --fractions train=0.9,val", 'expected NAME=SHARE,… such as "train=0.9,val=0.1", got'),
        ("split --fractions a=0.5,a=0.5", "expected NAME=SHARE"),
        ("split --fractions a/b=1", "expected NAME=SHARE"),
        ("split --fractions a=0.5,b=0.4", "that add up to 1"),
        ("filter", "expected a condition: --classes, --keys, --min-size or --list"),
        ("filter --classes aunt", "no class 'aunt'; did you mean 'ant'?"),
        ("filter --list nowhere.txt", "--list nowhere.txt: expected a file of keys, one a line: No such file"),
        ("merge", "at least two datasets to merge, got 1"),
    ],
)
def test_refused(chain, tmp_path, line, message):
    before = sorted(tmp_path.iterdir())
    words = line.split()
    done = chain.command(words[0], chain.latents, "--out", tmp_path / "out", *words[1:])
    assert message in done.message
    assert sorted(tmp_path.iterdir()) == before
