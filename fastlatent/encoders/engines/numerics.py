"""The switches of torch that change the last bits of an autoencoder's output, set once and recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fix_numerics(*, tf32: bool = False) -> None:
    """Set every switch of torch that would make bytes depend on timing, on history or on the defaults of a version.

    cuDNN takes its algorithm by heuristic, not by measuring, and only deterministic ones. float32 means float32: TF32
    (10 bits of mantissa, on by default in cuDNN's convolutions) is off everywhere, since who wants speed encodes in
    bfloat16; decoding may ask for `tf32`. Products of half precision are summed in float32.
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")  # on the CPU too: oneDNN would take bfloat16 for "medium"


def numerics(device: torch.device) -> dict[str, Any]:
    """What `fix_numerics` has set and changes bytes on `device`, for provenance; nothing on the CPU.

    Raises:
        ValueError: a switch was turned back since.
    """
    found = {
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    want = {**dict.fromkeys(found, False), "cudnn.deterministic": True, "float32_matmul_precision": "highest"}
    wrong = [f"{name}={found[name]}" for name in found if found[name] != want[name]]
    if wrong:
        raise ValueError(f"engine: call fix_numerics() before and leave its switches alone; got {', '.join(wrong)}")
    return {"tf32": False, "cudnn": "deterministic"} if device.type == "cuda" else {}


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got − want| / |want|, Frobenius norms in float64; NaN where either holds one, 0 for two zeros."""
    difference, norm = (got.double() - want.double()).norm(), want.double().norm()
    return float(difference / norm) if norm != 0 else float(difference)
