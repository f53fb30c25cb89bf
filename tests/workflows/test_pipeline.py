"""The chain of commands on a tiny class folder: what each one leaves, and that it is what plain code gives."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import plain_latentlm
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastlatent
from fastlatent.data.latents import LatentDataset
from fastlatent.models.checkpoint import read_config
from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.store.reader import Dataset
from fastlatent.workflows.latent_inputs import dataset_means


def moments(folder):
    """key → float32 [F, 2C, h, w] of a dataset, by plain safe_open."""
    dataset, found = Dataset.open(folder), {}
    for i in range(len(dataset)):
        with safe_open(folder / dataset.shards[dataset.shard[i]].path, "pt") as file:
            found[dataset.key(i)] = file.get_tensor("moments")[int(dataset.row[i])].float()
    return found


def plain_pixels(path, size=8):
    """ADM's centre crop again, with Pillow alone: halve with the box filter, one bicubic resize, cut."""
    image = Image.open(path).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).float()[None]


def plain_moments(vae, pixels):
    model = AutoencoderKL.from_pretrained(checkpoints(vae)[-1]).eval()
    with torch.inference_mode():
        posterior = model.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1)[0]


def test_what_the_chain_leaves(chain):
    assert [path.name for path in checkpoints(chain.vae)] == ["checkpoint-000002", "checkpoint-000003"]
    assert [path.name for path in checkpoints(chain.ar)] == ["checkpoint-000002", "checkpoint-000004"]
    for run, count in ((chain.vae, 3), (chain.ar, 4)):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(count))
        assert (run / "loss.png").stat().st_size > 0
    assert (checkpoints(chain.vae)[-1] / "preview.png").exists()
    dataset = Dataset.open(chain.latents)
    assert (len(dataset), len(dataset.shards), dataset.classes) == (8, 3, ["ant", "bee"])
    assert dataset.label.tolist() == [0] * 4 + [1] * 4
    config = read_config(checkpoints(chain.ar)[-1] / "config.json")
    assert (config.num_classes, config.input_size, config.in_channels, config.classes) == (2, 4, 2, ["ant", "bee"])
    assert config.latents_mean == dataset.statistics.latent_mean.tolist()
    assert config.vae["path"] == str(chain.vae)


@pytest.mark.parametrize(("run", "command"), [("vae", "train vae"), ("latents", "encode"), ("ar", "train ar")])
def test_the_kept_config_gives_the_same_command(chain, run, command):
    # Everything is done, so running it again from its own config is no work.
    folder = getattr(chain, run)
    before = chain.contents(folder)
    chain.ok(f"{command} --config", next(folder.glob("*.yaml")))
    assert chain.contents(folder) == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_encode_equals_a_plain_loop(chain, tmp_path, dtype):
    chain.ok(f"encode {chain.encode} --mirror --dtype {dtype} --out", tmp_path / "d", "--vae", chain.vae, chain.images)
    got = moments(tmp_path / "d")
    assert len(got) == 8
    # Half a last place of the stored dtype, and batches of 2 instead of 1 in float32.
    tolerance = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 0}[dtype]
    for key, rows in got.items():
        pixels = plain_pixels(chain.images / key)
        want = torch.stack([plain_moments(chain.vae, view) for view in (pixels, pixels.flip(-1))])
        assert rows.shape == (2, 4, 4, 4)
        torch.testing.assert_close(rows, want, rtol=tolerance + 1e-5, atol=1e-5)
        assert not torch.equal(rows[0], rows[1])
    chain.ok(f"train ar {chain.train_ar} --out", tmp_path / "ar", tmp_path / "d")


def test_encode_again_is_no_work(chain, tmp_path):
    latents = chain.copy("latents", tmp_path / "latents")
    before = {path: path.stat().st_mtime_ns for path in latents.rglob("*.safetensors")}
    done = chain.ok(f"encode {chain.encode} --out", latents, "--vae", chain.vae, chain.images)
    assert "0 files encoded now" in done.out
    theirs = {name: data for name, data in chain.contents(latents).items() if name != "encode.yaml"}
    ours = {name: data for name, data in chain.contents(chain.latents).items() if name != "encode.yaml"}
    assert theirs == ours
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_encode_from_python(chain, tmp_path):
    # In a thread, as a notebook server would; paths as Path and as text.
    settings = {"size": 8, "batch_size": 2, "unit_rows": 3, "threads": 1}
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(fastlatent.encode, chain.images, str(chain.vae), tmp_path / "d", **settings).result()
    assert (report.rows, report.encoded, report.shards, report.quarantined) == (8, 8, 3, {})
    got, want = moments(tmp_path / "d"), moments(chain.latents)
    assert all(torch.equal(got[key], want[key]) for key in want)
    with pytest.raises(ValueError, match="unknown key 'sizes'; did you mean 'size'"):
        fastlatent.encode(chain.images, chain.vae, tmp_path / "d", sizes=8)


def test_adding_editing_and_removing_files(chain, tmp_path):
    images, latents = chain.copy("images", tmp_path / "images"), chain.copy("latents", tmp_path / "latents")
    first = moments(latents)
    chain.image(77).save(images / "ant" / "new.png")
    chain.image(78).save(images / "bee" / "1.png")
    (images / "bee" / "3.png").unlink()
    done = chain.ok(f"encode {chain.encode} --out", latents, "--vae", chain.vae, images)
    assert "2 files encoded now" in done.out
    again = moments(latents)
    assert again.keys() == (first.keys() - {"bee/3.png"}) | {"ant/new.png"}
    for key in again:
        same = key in first and torch.equal(again[key], first[key])
        assert same == (key not in ("ant/new.png", "bee/1.png"))
        # Whatever its neighbours in the batch were, a row is what its image gives.
        want = plain_moments(chain.vae, plain_pixels(images / key))
        torch.testing.assert_close(again[key][0], want, rtol=1e-3, atol=1e-4)
    # An edited file comes back: its old row is still on the disk.
    shutil.copy(chain.images / "bee" / "1.png", images / "bee" / "1.png")
    assert "0 files encoded now" in chain.ok(f"encode {chain.encode} --out", latents, "--vae", chain.vae, images).out
    assert torch.equal(moments(latents)["bee/1.png"], first["bee/1.png"])


def test_a_row_does_not_depend_on_who_wrote_it(chain, tmp_path):
    # In one go, and in two: the same shards, hence the same bytes.
    images = chain.copy("images", tmp_path / "images")
    hidden = sorted(images.rglob("*.png"))[3:]  # the first unit of 3 stays
    data = {path: path.read_bytes() for path in hidden}
    for path in hidden:
        path.unlink()
    chain.ok(f"encode {chain.encode} --out", tmp_path / "latents", "--vae", chain.vae, images)
    for path, content in data.items():
        path.write_bytes(content)
    chain.ok(f"encode {chain.encode} --out", tmp_path / "latents", "--vae", chain.vae, images)
    got = moments(tmp_path / "latents")
    want = moments(chain.latents)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


# The other three of the eight are in the soak.
@pytest.mark.parametrize(
    ("payload", "dtype"),
    [("moments", dtype) for dtype in ("bfloat16", "float32", "int8")]
    + [("latents", dtype) for dtype in ("float16", "int8")]
    + [
        pytest.param(*other, marks=pytest.mark.soak)
        for other in (("moments", "float16"), ("latents", "bfloat16"), ("latents", "float32"))
    ],
)
def test_every_way_of_storing(chain, tmp_path, payload, dtype):
    latents = tmp_path / "latents"
    settings = f"--payload {payload} --dtype {dtype}"
    chain.ok(f"encode {chain.encode} {settings} --out", latents, "--vae", chain.vae, chain.images)
    dataset = LatentDataset(latents)
    means = dataset_means(dataset, np.arange(len(dataset)))
    keys = [dataset.store.key(i) for i in range(len(dataset))]
    want = torch.stack([plain_moments(chain.vae, plain_pixels(chain.images / key)).chunk(2)[0] for key in keys])
    # Half a step: of 11 bits, of 8 bits, and of 127 steps to the largest of a channel's 16 values.
    tolerance = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.51 / 127}[dtype]
    scale = want.abs() if dtype != "int8" else want.abs().amax((-1, -2), keepdim=True)
    assert ((means - want).abs() <= tolerance * scale + 1e-4).all()  # plain runs in batches of one
    assert dataset.store.payload == payload
    chain.ok("verify --full --reencode 3", latents)
    chain.ok("stats", latents)
    chain.ok(f"train ar {chain.train_ar} --out", tmp_path / "ar", latents)
    chain.ok("decode --threads 1 --output-dir", tmp_path / "decoded", latents)
    chain.ok("inspect", latents, "--vae", chain.vae, "--sheet", tmp_path / "sheet.png")
    # What is stored otherwise is another dataset.
    other = "--dtype int8" if dtype != "int8" else "--dtype float16"
    done = chain.command(f"encode {chain.encode} {settings} {other} --out", latents, "--vae", chain.vae, chain.images)
    assert "storage_dtype" in done.message


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_sample_equals_the_plain_sampler(chain, tmp_path, prediction_type):
    chain.ok(f"train ar {chain.train_ar} --prediction-type {prediction_type} --out", tmp_path / "ar", chain.latents)
    checkpoint = checkpoints(tmp_path / "ar")[-1]
    noise = torch.randn(4, 16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    output = tmp_path / "samples.safetensors"
    chain.ok(
        "sample --dtype float64 --num-inference-steps 3 --per-class 2 --cfg-scale 2.5 --no-decode --threads 1 --noise",
        tmp_path / "noise.safetensors", "--output", output, tmp_path / "ar",
    )  # fmt: skip
    got = load_file(output)
    state = {name: tensor.double() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    sizes = json.loads((checkpoint / "config.json").read_text())
    want = plain_latentlm.sample(
        state, sizes, torch.tensor([0, 0, 1, 1]), noise, prediction_type=prediction_type, steps=3, cfg_scale=2.5
    )
    assert got["labels"].tolist() == [0, 0, 1, 1]
    assert float((got["latents"] - want).abs().max() / want.abs().max()) <= 1e-10
    assert float(want.std()) > 0.01  # not all the same


def test_a_checkpoint_made_by_hand(chain, tmp_path):
    # Published keys and a config.json without anything that has a default.
    made = checkpoints(chain.ar)[-1]
    (tmp_path / "hand").mkdir()
    config = json.loads((made / "config.json").read_text())
    for optional in ("beta_schedule", "latents_mean", "latents_std", "vae", "classes"):
        del config[optional]
    (tmp_path / "hand" / "config.json").write_text(json.dumps(config))
    shutil.copy(made / "model.safetensors", tmp_path / "hand")
    for checkpoint, output in ((tmp_path / "hand", "hand"), (made, "made"), (chain.ar, "run")):
        done = chain.sample(checkpoint, tmp_path / f"{output}.safetensors", "--no-decode")
        assert done.code == 0, done.err
    hand, made, run = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("hand", "made", "run"))
    assert torch.equal(hand, made)
    assert torch.equal(run, made)
    # It does not know its autoencoder; the latents of such a sample decode with one that is named.
    assert "--vae PATH" in chain.command("decode --output-dir", tmp_path / "d", tmp_path / "hand.safetensors").message
    chain.ok("decode --threads 1 --output-dir", tmp_path / "d", "--vae", chain.vae, tmp_path / "hand.safetensors")


def test_sample_then_decode_equals_sample(chain, tmp_path):
    assert chain.sample(chain.ar, tmp_path / "images", "--labels 1,0,1").code == 0
    assert chain.sample(chain.ar, tmp_path / "latents.safetensors", "--labels 1,0,1 --no-decode").code == 0
    chain.ok("decode --threads 1 --output-dir", tmp_path / "decoded", tmp_path / "latents.safetensors")
    names = [json.loads(line)["name"] for line in (tmp_path / "images" / "images.jsonl").read_text().splitlines()]
    assert names == ["bee", "ant", "bee"]
    for i in range(3):
        one, other = (np.asarray(Image.open(tmp_path / d / "images" / f"{i:06d}.png")) for d in ("images", "decoded"))
        assert one.shape == (8, 8, 3)
        np.testing.assert_array_equal(one, other)
    assert (tmp_path / "images" / "sheet.png").exists()
    assert yaml.safe_load((tmp_path / "images" / "sample.yaml").read_text())["labels"] == "1,0,1"


def test_decoded_pixels_equal_plain_diffusers(chain, tmp_path):
    assert chain.sample(chain.ar, tmp_path / "out", "--per-class 2").code == 0
    config = read_config(checkpoints(chain.ar)[-1] / "config.json")
    latents = load_file(tmp_path / "out" / "latents.safetensors")["latents"].double()
    raw = latents * torch.tensor(config.latents_std) + torch.tensor(config.latents_mean)
    raw = raw.transpose(1, 2).reshape(4, 2, 4, 4).float()
    with torch.inference_mode():
        pixels = AutoencoderKL.from_pretrained(checkpoints(chain.vae)[-1]).eval().decode(raw).sample
    want = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    for i in range(4):
        got = np.asarray(Image.open(tmp_path / "out" / "images" / f"{i:06d}.png"))
        np.testing.assert_allclose(got, want[i], atol=1)  # a value on .5 may round either way


def test_decode_of_a_dataset(chain, tmp_path):
    chain.ok("decode --threads 1 --limit 3 --output-dir", tmp_path / "d", chain.latents)
    lines = [json.loads(line) for line in (tmp_path / "d" / "images.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["ant/0.png", "ant/1.png", "ant/2.png"]
    assert len(list((tmp_path / "d" / "images").iterdir())) == 3


@pytest.mark.parametrize("solver", ["dpmsolver++", "ddpm"])  # ddpm draws noise at every step
def test_batches_and_seeds_of_sample(chain, tmp_path, solver):
    def latents(more):
        output = tmp_path / f"{more}.safetensors".replace(" ", "")
        assert chain.sample(chain.ar, output, f"--no-decode --per-class 2 --solver {solver} {more}").code == 0
        return load_file(output)["latents"]

    want = latents("--seed 3")
    for batch_size in (1, 3, 4):  # one by one; with a short last batch; all
        torch.testing.assert_close(latents(f"--seed 3 --batch-size {batch_size}"), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(latents("--seed  3"), want)
    assert float((latents("--seed 4") - want).abs().max()) > 0.1


def test_seeds_of_training(chain, tmp_path):
    def weights(name, seed):
        chain.ok(f"train ar {chain.train_ar} --seed {seed} --out", tmp_path / name, chain.latents)
        return load_file(checkpoints(tmp_path / name)[-1] / "model.safetensors")

    want = load_file(checkpoints(chain.ar)[-1] / "model.safetensors")
    same, other = weights("a", 0), weights("b", 1)
    assert all(torch.equal(same[name], want[name]) for name in want)
    assert not any(torch.equal(other[name], want[name]) for name in want)


def test_the_compiled_kernels_are_what_runs(chain, tmp_path, monkeypatch):
    from fastlatent import _native

    called = []
    original = _native.call
    monkeypatch.setattr(_native, "call", lambda *args: called.append(args[1]) or original(*args))
    chain.ok(f"train ar {chain.train_ar} --out", tmp_path / "ar", chain.latents)
    # 4 steps; one batch may be filled ahead of the last, and the probe looks at what is in memory.
    assert 4 <= called.count("gather_rows") <= 6
    reading = {"gather_rows", "count_resident", "advise_random", "populate_rows"}
    assert set(called) <= reading | {"sample_posterior", "linear", "diffusion_head_sample"}  # the last two: the preview
    assert called.count("sample_posterior") == 4 * 4  # latents, noise, times and dropout
    called.clear()
    assert chain.sample(tmp_path / "ar", tmp_path / "s.safetensors", "--no-decode").code == 0
    assert called == (["linear"] * 6 + ["diffusion_head_sample"]) * 16  # one block and the condition, then the head


def test_flat_folders_encode_and_do_not_train(chain, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        chain.image(i).save(flat / f"{i}.png")
    chain.ok(f"encode {chain.encode} --out", tmp_path / "d", "--vae", chain.vae, flat)
    assert Dataset.open(tmp_path / "d").label.tolist() == [-1] * 3
    message = chain.command(f"train ar {chain.train_ar} --out", tmp_path / "ar", tmp_path / "d").message
    assert "needs a label for every row" in message


def test_grey_autoencoder(chain, tmp_path):
    chain.ok(f"train vae {chain.train_vae} --channels 1 --mirror --out", tmp_path / "vae", chain.images)
    chain.ok(f"encode {chain.encode} --out", tmp_path / "d", "--vae", tmp_path / "vae", chain.images)
    chain.ok("decode --threads 1 --output-dir", tmp_path / "o", tmp_path / "d")
    assert Image.open(tmp_path / "o" / "images" / "000000.png").mode == "L"


@pytest.mark.parametrize("what", ["images", "vae", "ar", "checkpoint", "latents", "shard", "samples"])
def test_inspect(chain, tmp_path, what):
    if what == "samples":
        assert chain.sample(chain.ar, tmp_path / "s.safetensors", "--no-decode").code == 0
    shard = chain.latents / Dataset.open(chain.latents).shards[0].path
    path, kind = {
        "images": (chain.images, None),
        "vae": (chain.vae, "run"),
        "ar": (chain.ar, "run"),
        "checkpoint": (checkpoints(chain.ar)[-1], "checkpoint"),
        "latents": (chain.latents, "latent dataset"),
        "shard": (shard, "latent shard"),
        "samples": (tmp_path / "s.safetensors", "sampled latents"),
    }[what]
    if kind is None:
        assert "expected a dataset (dataset.json), a run" in chain.command("inspect", path).message
        return
    out = chain.ok("inspect", path).out
    assert yaml.safe_load(out[out.index("kind:") :])["kind"] == kind


def test_inspect_draws_a_sheet(chain, tmp_path):
    for path in (chain.latents, tmp_path / "s.safetensors"):
        if path.suffix:
            assert chain.sample(chain.ar, path, "--no-decode").code == 0
        sheet = tmp_path / f"{path.stem}.png"
        chain.ok("inspect --rows 2 --sheet", sheet, "--vae", chain.vae, path)
        assert Image.open(sheet).width > 64


def test_inspect_of_a_run_in_training_is_not_a_dataset(chain, tmp_path):
    from fastlatent.store.build import Lock

    run = chain.copy("ar", tmp_path / "ar")
    lock = Lock(run)
    try:
        assert "kind: run" in chain.ok("inspect", run).out
    finally:
        lock.release()
