"""Load the library built from csrc/ and call it. The only module that knows about ctypes."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path

_CTYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
# The enum in csrc/fastlatent.h.
_BAD_INDEX = 2
_ERRORS = {
    1: "unsupported dtype",
    _BAD_INDEX: "an index is out of range",
    3: "a thread could not be started",
    4: "out of memory",
}
DTYPE_CODES = {"float64": 0, "float32": 1, "bfloat16": 2, "float16": 3}


class BadIndexError(RuntimeError):
    """A kernel met an index outside its range and wrote nothing."""


@functools.cache
def load(backend: str) -> ctypes.CDLL | None:
    """Return libfastlatent_<backend>, or None where it was not built."""
    # In an editable install the package has two roots: the source tree and site-packages. Its name is not written here:
    # tools/hub_kernels ships this file in a package of another name.
    for root in map(Path, sys.modules[__name__.rpartition(".")[0]].__path__):
        library = root / "lib" / f"libfastlatent_{backend}.so"
        if library.exists():
            return _declare(ctypes.CDLL(str(library)), (root / "lib" / "fastlatent.h").read_text())
    return None


def call(backend: str, function: str, *args: int | float | None) -> None:
    """Call fastlatent_<function>_<backend>; pointers are passed as integers. The GIL is released meanwhile.

    Raises:
        RuntimeError: the library is missing, or the function returned an error code.
    """
    library = load(backend)
    if library is None:
        raise RuntimeError(
            f"{function}: libfastlatent_{backend}.so is not beside the package; build it with `pip install .`, "
            "and see `fastlatent doctor`"
        )
    code = getattr(library, f"fastlatent_{function}_{backend}")(*args)
    if code:
        error = BadIndexError if code == _BAD_INDEX else RuntimeError
        raise error(f"{function}: the {backend} kernel failed: {_ERRORS.get(code, f'code {code}')}")


def _declare(library: ctypes.CDLL, header: str) -> ctypes.CDLL:
    """Set argtypes from the installed header, so the C signature is written once."""
    for name, args in re.findall(r"^FASTLATENT_API int (fastlatent_\w+)\((.*)\);", header, re.MULTILINE):
        if hasattr(library, name):
            getattr(library, name).argtypes = [
                ctypes.c_void_p if "*" in arg else _CTYPES[arg.split()[0]] for arg in args.split(", ")
            ]
    return library
