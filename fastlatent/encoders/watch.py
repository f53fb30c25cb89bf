"""A watch over encoding in half precision: what overflows is encoded again in float32, and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlatent.encoders.protocol import Autoencoder


class Encoder(Protocol):
    """What is watched: an autoencoder, a teacher."""

    def encode(self, pixels: Tensor, /) -> Tensor:
        """A batch → float32 rows."""
        ...

    def upcast(self) -> Any:
        """The same in float32."""
        ...


class OverflowWatch:
    """Encodes batches, and repairs rows with NaN or infinity.

    A batch with such a row is encoded whole in float32 and only these rows are taken from that: the result is a
    function of the batch, whatever came before it. Rows that stay non-finite are left so.

    Args:
        encoder: gives its float32 copy when the first row overflows; it then takes that much more memory.
        dtype: what `encode` computes in. In float32 nothing is repeated.
        encode: an engine's; encoder.encode without one. A batch → float32 rows.

    Attributes:
        retried: rows that were encoded again.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype, encode: Callable[[Tensor], Tensor] | None = None) -> None:
        self._encoder = encoder
        self._encode = encode or encoder.encode
        self._full: Encoder | None = None
        self._half = dtype != torch.float32
        self.retried = 0

    def encode(self, pixels: Tensor) -> Tensor:
        return self.repair(pixels, self._encode(pixels))

    def repair(self, pixels: Tensor, encoded: Tensor, count: int | None = None) -> Tensor:
        """`encoded`, what `pixels` were encoded to, with its non-finite rows replaced; on the device of `encoded`.

        count: how many rows are images; what follows them is padding, and is not counted in `retried`.
        """
        if not self._half:
            return encoded
        finite = encoded.flatten(1).isfinite().all(1)
        if finite.all():
            return encoded
        self._full = self._full or self._encoder.upcast()
        self.retried += int((~finite[:count]).sum())
        again = self._full.encode(pixels).to(encoded.device)
        return torch.where(finite.reshape(-1, *[1] * (encoded.ndim - 1)), encoded, again)


def precision_warning(vae: Autoencoder, dtype: torch.dtype) -> str | None:
    """What to tell the user of an autoencoder that was made for float32 and is run in float16; None if it is well."""
    if dtype != torch.float16 or not getattr(vae, "force_upcast", False):
        return None
    return (
        "this autoencoder's config.json says force_upcast: its activations overflow float16. Images that overflow are "
        "encoded again in float32; bfloat16 does not overflow"
    )
