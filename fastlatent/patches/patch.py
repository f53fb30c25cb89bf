"""Replace the sampling loop of another project's model by the fused one, and undo it."""

from __future__ import annotations

import importlib
from typing import Any

from fastlatent.patches.handle import PatchHandle

# family -> module under fastlatent.patches: `mismatch(model) -> str` is "" where the model is of this family, else what
# is missing or otherwise; `apply(model, handle)` replaces the loop, and raises ValueError before it replaces anything.
FAMILIES = {"vibevoice": "vibevoice", "latentlm": "latentlm", "harmon": "harmon", "mar": "mar", "nextstep": "nextstep"}


def patch(model: Any, *, family: str | None = None) -> PatchHandle:
    """Have a model of another project sample its tokens with our op; its interface stays.

    A loop of S solver steps over the diffusion head becomes one op. Random numbers are drawn as the model itself draws
    them, so the same seed gives the same tokens but for rounding.

    Args:
        model: of one of FAMILIES: VibeVoiceForConditionalGeneration of transformers, MAR, Harmon, NextStep-1, LatentLM.
        family: which; None tells it by the model's modules and methods.

    Returns:
        The handle: `undo()` or the end of its `with` block gives the model its own loop back.

    Raises:
        ValueError: no model of a known family, or not quite (the message says what differs); it is patched already.
            Nothing is replaced then.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"patch: expected a family of {', '.join(FAMILIES)}, got {family!r}")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper calls the methods of what it wraps
    modules = {
        name: importlib.import_module(f"fastlatent.patches.{FAMILIES[name]}")
        for name in ([family] if family else FAMILIES)
    }
    wrong = {name: module.mismatch(model) for name, module in modules.items()}
    fitting = [name for name, why in wrong.items() if not why]
    if not fitting:
        reasons = "\n  ".join(f"{name}: {why}" for name, why in wrong.items())
        raise ValueError(f"patch: expected a model of a known family, got {type(model).__name__}\n  {reasons}")
    handle = PatchHandle(model, fitting[0])
    try:
        modules[fitting[0]].apply(model, handle)
    except BaseException:
        handle.undo()
        raise
    return handle
