"""What the tests of bad input do to the shared chain (conftest.py): commands on it, and damaged copies of it."""

import json
import shutil

from safetensors.torch import load_file, save_file

from fastlatent.pipeline.checkpoints import checkpoints

NAN = float("nan")


def encode(chain, images, out, more="", vae=None):
    return chain.command(f"encode {chain.encode} {more} --out", out, "--vae", vae or chain.vae, images)


def train_ar(chain, out, more="", latents=None):
    return chain.command(f"train ar {chain.train_ar} {more} --out", out, latents or chain.latents)


def train_vae(chain, out, more="", images=None):
    return chain.command(f"train vae {chain.train_vae} {more} --out", out, images or chain.images)


def changed_config(chain, to, run="ar", **values):
    """A copy of a checkpoint with some entries of config.json changed; None removes one."""
    shutil.copytree(checkpoints(getattr(chain, run))[-1], to)
    config = json.loads((to / "config.json").read_text()) | values
    config = {name: value for name, value in config.items() if value is not None}
    (to / "config.json").write_text(json.dumps(config))
    return to


def changed_weights(chain, to, change, run="ar", name="model.safetensors"):
    shutil.copytree(checkpoints(getattr(chain, run))[-1], to)
    save_file(change(load_file(to / name)), to / name)
    return to


def other_vae(chain, to):
    """The same sizes with other weights."""
    name = "diffusion_pytorch_model.safetensors"
    return changed_weights(chain, to, lambda state: {k: v + 0.01 for k, v in state.items()}, "vae", name)
