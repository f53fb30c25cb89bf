"""Published checkpoints: what weights tell, what they cannot, and every refusal."""

import dataclasses
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastlatent.models import published, transformer
from fastlatent.models.checkpoint import CheckpointConfig, load_checkpoint, save_checkpoint
from fastlatent.models.transformer import Transformer, TransformerConfig, published_size

NAN, INF = float("nan"), float("inf")
# FFN width floor(64·1.5·2/3/64)·64 = 64: 1.5 is the smallest such ratio, the one inferred. Head size 16, grouped keys.
SIZES = TransformerConfig(
    hidden_size=64, depth=2, num_heads=4, num_kv_heads=2, mlp_ratio=1.5, diffusion_depth=1, in_channels=3, input_size=2,
    num_classes=5,
)  # fmt: skip
UNTOLD = {"prediction_type": "v_prediction", "input_size": 2, "num_heads": 4}
FACTORS = {"scaling_factor": 0.25, "bias_factor": 0.5, "steps": 7}
# Published order of the unnamed average, written out for these sizes.
MLP = ("fc1", "gate", "fc2")
ORDER = [
    "x_embedder.proj.weight", "x_embedder.proj.bias", "noisy_x_embedder.proj.weight", "noisy_x_embedder.proj.bias",
    "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight",
    *(f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "attn.proj", *(f"mlp.{m}" for m in MLP))),
    *(f"diffusion_blocks.0.mlp.{m}.weight" for m in MLP), "diffusion_blocks.0.adaLN_modulation.1.weight",
    "condition_layer.linear.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight",
]  # fmt: skip


def weights(seed=0, sizes=SIZES):
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(sizes)
    return {name: 0.05 * torch.randn(tuple(p.shape), generator=generator) for name, p in model.named_parameters()}


def folder_with(folder, *, kind="safetensors", state=None, other=FACTORS, config=UNTOLD):
    """A checkpoint folder; None leaves a file out."""
    folder.mkdir(parents=True, exist_ok=True)
    state = weights() if state is None else state
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "deepspeed":
        (folder / "pytorch_model").mkdir(exist_ok=True)
        engine = {
            "module": state, "param_shapes": [{k: v.shape for k, v in state.items()}], "buffer_names": [],
            "optimizer": None, "sparse_tensor_module_names": set(), "ds_config": {"a": 1}, "global_steps": 7,
        }  # fmt: skip
        torch.save(engine, folder / "pytorch_model" / "mp_rank_00_model_states.pt")
    if other is not None:
        torch.save(other if "ema" in other else other | {"ema": None}, folder / "other_state.pth")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder, **more):
    return load_checkpoint(folder, torch.float32, "cpu", **more)


def refused(folder, **more):
    with pytest.raises(ValueError) as error:
        load(folder, **more)
    return str(error.value)


# --- what is read ---


@pytest.mark.parametrize("kind", ["safetensors", "deepspeed"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_both_layouts_and_the_prefix_of_ddp(tmp_path, kind, prefix):
    state = weights()
    folder_with(tmp_path, kind=kind, state={prefix + name: tensor for name, tensor in state.items()})
    model, config = load(tmp_path)
    assert {name: getattr(config, name) for name in dataclasses.asdict(SIZES)} == dataclasses.asdict(SIZES)
    assert (config.prediction_type, config.beta_schedule, config.vae, config.classes) == (
        "v_prediction", "cosine", None, [],
    )  # fmt: skip
    # normalised = (z + 0.5)·0.25, hence z = normalised·4 − 0.5
    assert (config.latents_mean, config.latents_std) == (-0.5, 4.0)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_weights_of_bfloat16_and_of_old_files(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in weights().items()}
    folder = folder_with(tmp_path, kind="deepspeed", state=state)
    # Files of torch < 1.6 are no zip archives and cannot be mapped.
    torch.save(FACTORS | {"ema": None}, folder / "other_state.pth", _use_new_zipfile_serialization=False)
    loaded = load(folder)[0].state_dict()
    assert all(torch.equal(loaded[name], state[name].float()) for name in state)


def test_safetensors_are_preferred(tmp_path):
    # What zero_to_fp32.py made lies beside the shards that it was made of.
    folder = folder_with(tmp_path, kind="deepspeed", state=weights(1))
    (folder / "pytorch_model" / "mp_rank_00_model_states.pt").rename(
        folder / "pytorch_model" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    )
    assert "DeepSpeed ZeRO stage 3" in refused(folder)
    state = weights(2)
    save_file(state, folder / "model.safetensors")
    assert torch.equal(load(folder)[0].condition_layer.linear.weight, state["condition_layer.linear.weight"])


def test_the_names_of_published_sizes_say_the_heads(tmp_path, monkeypatch):
    monkeypatch.setitem(transformer.SIZES, "Transformer-Tiny", (2, 64, 4, 2, 1))
    folder = folder_with(tmp_path, config={"prediction_type": "flow", "input_size": 2})
    config = load(folder)[1]
    assert (config.num_heads, config.num_kv_heads, config.mlp_ratio) == (4, 2, 2)
    # The qkv of other heads has the same width: 2 heads of 32, 1 of keys. Whoever knows better says so.
    (folder / "config.json").write_text(json.dumps({"prediction_type": "flow", "input_size": 2, "num_heads": 2}))
    config = load(folder)[1]
    assert (config.num_heads, config.num_kv_heads) == (2, 1)


@pytest.mark.parametrize(
    ("name", "grouped"),
    [(name, n) for name in transformer.SIZES for n in (1, 2) if published_size(name)["num_heads"] % n == 0],
)
def test_every_published_size_is_recognised(tmp_path, name, grouped):
    values = published_size(name) | {"in_channels": 16, "input_size": 16, "num_classes": 1000}
    values["num_kv_heads"] //= grouped
    with torch.device("meta"):
        state = dict(Transformer(TransformerConfig(**values)).state_dict())
    given = {"prediction_type": "flow", "input_size": 16}
    found = published.complete(tmp_path, given, state, {"scaling_factor": 1.0, "bias_factor": 0.0})
    assert found == values | given | {"latents_mean": 0.0, "latents_std": 1.0}


# One unit of 64, published widths that floor cut (2688, 3392), and 22·(320·1.5/22)·2/3 = 319.99…, which floor spoils.
@pytest.mark.parametrize(("hidden", "width"), [(64, 64), (1024, 2688), (1280, 3392), (22, 320)])
def test_the_ratio_gives_the_width(hidden, width):
    state = {
        "x_embedder.proj.weight": torch.empty(hidden, 1, 1, 1, device="meta"),
        "blocks.0.mlp.fc1.weight": torch.empty(width, hidden, device="meta"),
        "blocks.0.attn.qkv.weight": torch.empty(3 * hidden, hidden, device="meta"),
        "y_embedder.embedding_table.weight": torch.empty(2, hidden, device="meta"),
    }
    ratio = published._sizes(state, {})["mlp_ratio"]
    assert transformer.ffn_width(hidden, ratio) == width


def test_model_config_is_read_instead_of_config_json(tmp_path):
    folder = folder_with(tmp_path / "c", config={"prediction_type": "epsilon", "input_size": 3, "num_heads": 4})
    file = tmp_path / "model.json"
    file.write_text(json.dumps(UNTOLD | {"beta_schedule": "linear", "classes": list("abcde"), "latents_mean": -0.5}))
    config = load(folder, model_config=file)[1]
    assert (config.prediction_type, config.input_size, config.beta_schedule) == ("v_prediction", 2, "linear")
    assert config.classes == list("abcde")


def test_our_own_checkpoints_are_as_they_were(tmp_path):
    config = CheckpointConfig(**dataclasses.asdict(SIZES), prediction_type="flow", latents_std=[1.0, 2.0, 3.0])
    state = weights()
    save_checkpoint(tmp_path, config, state)
    model, read = load(tmp_path)
    assert read == config
    assert torch.equal(model.final_layer.linear.weight, state["final_layer.linear.weight"])
    assert "already is the average" in refused(tmp_path, ema=True)
    # One without other_state.pth and without its config.json: all that weights cannot tell is asked for.
    (tmp_path / "config.json").unlink()
    message = refused(tmp_path)
    assert "do not tell prediction_type, input_size, num_heads, latents_mean, latents_std;" in message
    assert "come from other_state.pth, which is not there" in message


# --- which folder ---


def test_latest_names_the_newest(tmp_path):
    old = folder_with(tmp_path / "run" / "checkpoint-9", other=FACTORS | {"scaling_factor": 1.0})
    folder_with(tmp_path / "run" / "checkpoint-10")
    run = old.parent
    assert load(run)[1].latents_std == 4.0  # by number, not by name
    (run / "latest").write_text("/elsewhere/run/checkpoint-9\n")
    assert load(run)[1].latents_std == 1.0
    moved = old.rename(tmp_path / "checkpoint-9")
    (run / "latest").write_text(str(moved))  # as a path of this machine
    assert load(run)[1].latents_std == 1.0
    for text in ("/elsewhere/checkpoint-11", "checkpoint-11", "", "\0\xff"):
        (run / "latest").write_text(text, encoding="latin-1")
        assert "latest names" in refused(run)
    assert load(run / "checkpoint-10")[1].latents_std == 4.0
    # DeepSpeed leaves a `latest` of its own inside the folder.
    (run / "checkpoint-10" / "latest").write_text("pytorch_model")
    assert load(run / "checkpoint-10")[1].latents_std == 4.0


# --- averaged weights ---


def test_the_order_of_parameters_is_the_published_one():
    assert list(weights()) == ORDER


def test_averaged_weights(tmp_path):
    shadow = weights(1)
    ema = {"decay": 0.9999, "min_decay": 0.9999, "optimization_step": 7, "shadow_params": [shadow[n] for n in ORDER]}
    folder = folder_with(tmp_path, other=FACTORS | {"ema": ema})
    plain, averaged = load(folder)[0].state_dict(), load(folder, ema=True)[0].state_dict()
    assert all(torch.equal(averaged[name], shadow[name]) for name in ORDER)
    assert not any(torch.equal(averaged[name], plain[name]) for name in ORDER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Without the first bias every later tensor moves up by one: the first that cannot fit is named.
        (lambda s: s[:1] + s[2:], "shadow_params[1] in {file} to be x_embedder.proj.bias [64], got [64, 3, 1, 1]"),
        (lambda s: s[:-1], "expected 24 tensors in shadow_params of {file}, got 23: index 23 is missing (final_layer"),
        (lambda s: [*s, s[0]], "expected 24 tensors in shadow_params of {file}, got 25: index 24 belongs to no weight"),
        (
            lambda s: [s[0].transpose(0, 1).contiguous(), *s[1:]],
            "shadow_params[0] in {file} to be x_embedder.proj.weight",
        ),
        (lambda s: [3, *s[1:]], "x_embedder.proj.weight [64, 3, 1, 1], got int"),
        (lambda s: [], "got 0: index 0 is missing (x_embedder.proj.weight)"),
        (lambda s: None, "expected a list ema.shadow_params in {file}, got NoneType"),
    ],
)
def test_averages_that_do_not_fit(tmp_path, change, message):
    state = weights()
    folder = folder_with(tmp_path, other=FACTORS | {"ema": {"shadow_params": change([state[n] for n in ORDER])}})
    got = refused(folder, ema=True)
    assert message.format(file=folder / "other_state.pth") in got
    load(folder)  # nobody asked for the average


def test_no_averages(tmp_path):
    assert "trained without --use_ema" in refused(folder_with(tmp_path / "a"), ema=True)
    assert "got NoneType" in refused(folder_with(tmp_path / "b", other=FACTORS | {"ema": [1]}), ema=True)


# --- what cannot be known ---


@pytest.mark.parametrize("kind", ["safetensors", "deepspeed"])
@pytest.mark.parametrize("other", [FACTORS, None])
def test_the_line_to_paste_is_accepted(tmp_path, kind, other):
    # Heads of 64, which is what the line suggests: 1 head.
    sizes = dataclasses.replace(SIZES, num_heads=1, num_kv_heads=1)
    given = {"beta_schedule": "linear"} if other else {}
    folder = folder_with(tmp_path, kind=kind, state=weights(sizes=sizes), other=other, config=None)
    (tmp_path / "model.json").write_text(json.dumps(given))
    message = refused(folder, model_config=tmp_path / "model.json")
    line = json.loads(message.splitlines()[-1])
    asked = {"prediction_type": "epsilon", "input_size": 16, "num_heads": 1}
    assert line == given | asked | ({} if other else {"latents_mean": 0.0, "latents_std": 1.0})
    assert f"do not tell {', '.join(name for name in line if name != 'beta_schedule')};" in message
    (tmp_path / "model.json").write_text(message.splitlines()[-1])
    assert load(folder, model_config=tmp_path / "model.json")[1].prediction_type == "epsilon"


def test_only_what_is_missing_is_asked_for(tmp_path):
    message = refused(folder_with(tmp_path, config={"num_heads": 4, "prediction_type": "flow"}))
    assert "do not tell input_size; write them to" in message
    assert json.loads(message.splitlines()[-1]) == {"num_heads": 4, "prediction_type": "flow", "input_size": 16}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 3}, "depth is 2 by the files in"),
        ({"mlp_ratio": 4}, "mlp_ratio is 1.5 by the files"),
        ({"mlp_ratio": "2"}, "mlp_ratio is 1.5 by the files"),
        ({"mlp_ratio": NAN}, "mlp_ratio is 1.5 by the files"),
        ({"num_kv_heads": 4}, "num_kv_heads is 2 by the files"),
        ({"num_classes": 6}, "num_classes is 5 by the files"),
        ({"latents_std": 3.0}, "latents_std is 4.0 by the files"),
        ({"latents_mean": [-0.5, -0.5, -0.5]}, "latents_mean is -0.5 by the files"),
        ({"num_heads": 3}, "num_heads to divide hidden_size 64, got 3"),
        ({"num_heads": 0}, "num_heads to divide hidden_size 64, got 0"),
        ({"num_heads": None}, "num_heads to divide hidden_size 64, got None"),
        ({"num_heads": "4"}, "num_heads to divide hidden_size 64, got '4'"),
        # 1 head of 64 would need 128 rows for one pair of key and value heads; there are 64.
        ({"num_heads": 1}, "has 128 rows; with num_heads 1 expected 64 + 2·64·num_kv_heads"),
        ({"prediction_type": "eps"}, "expected prediction_type epsilon, v_prediction, flow, got 'eps'"),
        ({"input_size": 0}, "expected input_size to be a positive number, got 0"),
        ({"input_sise": 2}, "unknown key 'input_sise' in"),
        ({"classes": ["a"]}, "expected 5 names in classes"),
    ],
)
def test_configs_that_contradict(tmp_path, values, message):
    assert message in refused(folder_with(tmp_path, config=UNTOLD | values))


def test_model_configs_that_do_not_read(tmp_path):
    folder = folder_with(tmp_path / "c")
    file = tmp_path / "model.json"
    assert f"{file} does not read as JSON" in refused(folder, model_config=file)
    file.write_text("[]")
    assert "expected a JSON object" in refused(folder, model_config=file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scaling_factor": NAN}, "expected scaling_factor in {file} to be a finite number above 0, got nan"),
        ({"scaling_factor": 0.0}, "above 0, got 0.0"),
        ({"scaling_factor": -1.0}, "above 0, got -1.0"),
        ({"scaling_factor": None}, "above 0, got None"),
        ({"scaling_factor": torch.ones(2)}, "above 0, got tensor([1., 1.])"),
        ({"scaling_factor": 1e-320}, "latents_std"),  # its inverse is infinite
        ({"bias_factor": NAN}, "expected bias_factor in {file} to be a finite number, got nan"),
        ({"bias_factor": INF}, "got inf"),
        ({"bias_factor": None}, "got None"),
    ],
)
def test_bad_factors(tmp_path, values, message):
    folder = folder_with(tmp_path, other=FACTORS | values)
    assert message.format(file=folder / "other_state.pth") in refused(folder)


def test_factors_as_tensors_and_no_bias(tmp_path):
    config = load(folder_with(tmp_path, other={"scaling_factor": torch.tensor(0.5), "bias_factor": 0}))[1]
    assert (config.latents_mean, config.latents_std) == (0.0, 2.0)


# --- weights of something else ---


@pytest.mark.parametrize("kind", ["safetensors", "deepspeed"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {f"model.{k}".replace("x_embedder", "input_embedder"): v for k, v in s.items()}, "SynthLM main"),
        (lambda s: s | {"time_embedder.mlp.0.weight": torch.zeros(1)}, "'time_embedder.mlp.0.weight'"),
        # Whatever has positions is taken for a DiT.
        (
            lambda s: s | {"pos_embed": torch.zeros(1, 4, 64)},
            ".weight', which a model of the first weights' sizes lacks",
        ),
        (lambda s: {"a": torch.zeros(1)}, "not a LatentLM Transformer or DiT (it holds 'a')"),
        (lambda s: s | {"x_embedder.proj.weight": torch.zeros(64, 3)}, "to have 4 dimensions"),
        (lambda s: s | {"x_embedder.proj.weight": torch.zeros(64, 3, 2, 2)}, "[64, 3, 2, 2] in"),
        (lambda s: s | {"blocks.0.mlp.fc1.weight": torch.zeros(65, 64)}, "a multiple of 64 rows"),
        (
            lambda s: s | {"diffusion_blocks.0.mlp.fc1.weight": torch.zeros(128, 64)},
            "but the first weights' sizes give",
        ),
        (lambda s: s | {"extra": torch.zeros(1)}, "holds 'extra', which a model of the first weights' sizes lacks"),
        (lambda s: s | {"blocks.99999999.mlp.fc1.weight": torch.zeros(1)}, "holds 'blocks.99999999.mlp.fc1.weight'"),
        (lambda s: {k: v for k, v in s.items() if k != "blocks.1.mlp.fc2.weight"}, "lacks 'blocks.1.mlp.fc2.weight'"),
        (lambda s: {k: v for k, v in s.items() if "diffusion" not in k}, "diffusion_depth to be a positive number"),
        (lambda s: {}, "holds no weights"),
    ],
)
def test_other_weights(tmp_path, kind, change, message):
    assert message in refused(folder_with(tmp_path, kind=kind, state=change(weights())))


def test_lightning_checkpoints(tmp_path):
    file = tmp_path / "last.ckpt"
    file.write_bytes(b"anything")
    for path in (tmp_path, file):
        message = refused(path)
        assert f"{file} is a Lightning checkpoint" in message
        assert "SynthLM main, another architecture" in message
    # Beside weights of ours it is none of our business.
    load(folder_with(tmp_path))


@pytest.mark.parametrize("names", [["zero_pp_rank_0_mp_rank_00"], ["mp_rank_00", "mp_rank_01"], ["mp_rank_01"]])
def test_shards_of_deepspeed(tmp_path, names):
    # The name with the stem of the one file, but not alone: half of the weights is somewhere else.
    folder = folder_with(tmp_path, kind=None)
    (folder / "pytorch_model").mkdir()
    for name in names:
        (folder / "pytorch_model" / f"{name}_model_states.pt").write_bytes(b"")
    message = refused(folder)
    assert f"found {names[0]}_model_states.pt" in message
    assert "python zero_to_fp32.py . fp32 --safe_serialization" in message


@pytest.mark.parametrize("content", [{"modules": {}}, {"module": None}, {"module": {"a": 1}}, [1]])
def test_deepspeed_files_without_weights(tmp_path, content):
    folder = folder_with(tmp_path, kind="deepspeed")
    torch.save(content, folder / "pytorch_model" / "mp_rank_00_model_states.pt")
    assert re.search('expected a dict (of tensors under "module" )?in', refused(folder))


@pytest.mark.parametrize("name", ["other_state.pth", "pytorch_model/mp_rank_00_model_states.pt"])
def test_damaged_files(tmp_path, name):
    file = folder_with(tmp_path, kind="deepspeed") / name
    whole = file.read_bytes()
    # Nothing, no archive, an archive without its directory, and one with a changed pickle.
    assert b"module" in whole or b"scaling" in whole
    changed = whole.replace(b"module", b"mod\xffle").replace(b"scaling", b"\xffcaling")
    for data in (b"", b"garbage", whole[:-40], changed):
        file.write_bytes(data)
        assert f"{file} does not load: " in refused(tmp_path)


def test_what_needs_pickle_is_not_run_and_can_be_converted(tmp_path, monkeypatch):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    folder = folder_with(tmp_path / "it's here", kind="deepspeed")
    shadow = [tensor for tensor in weights(1).values()]
    states = {
        "other_state.pth": FACTORS | {"scaling_factor": np.float64(0.25), "ema": {"shadow_params": shadow}},
        "pytorch_model/mp_rank_00_model_states.pt": {"module": weights(), "scheduler": Evil()},
    }
    for name, state in states.items():
        before = (folder / name).read_bytes()
        torch.save(state, folder / name)
        message = refused(folder)
        assert not ran.exists()
        assert f"{folder / name} holds" in message
        assert "which only pickle can load" in message
        python, c, code, file = shlex.split(message.splitlines()[-1])
        assert (python, c, file) == ("python", "-c", str(folder / name))
        monkeypatch.setattr(sys, "argv", ["-c", file])
        exec(code, {})
        assert (folder / name).read_bytes() != before
        load(folder)
        ran.unlink(missing_ok=True)
    assert load(folder)[1].latents_std == 4.0
    assert torch.equal(load(folder, ema=True)[0].x_embedder.proj.weight, shadow[0])
