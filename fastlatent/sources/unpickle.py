"""Pickled dicts of numpy arrays, read without pickle: nothing in the file is ever called or imported.

A machine with the few opcodes that numpy's arrays need works through the pickle; the names a pickle may use
(numpy.ndarray and six more) are symbols to it, and it builds the arrays itself from bytes it has counted. So no
pickle can run code, allocate more than its own size, or hang the reader by hashing nested keys; pickle.Unpickler
with a `find_class` prevents the first only (`LONG_BINPUT` alone makes it allocate 64 GiB). Torch-free.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_BYTES = 64 * 2**20  # a trajectory of a million frames has 24 MB of poses

_SYMBOLS = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy.core.multiarray scalar": "scalar",
    "numpy._core.multiarray scalar": "scalar",
    "numpy.core.numeric _frombuffer": "frombuffer",  # protocol 5
    "numpy._core.numeric _frombuffer": "frombuffer",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",  # protocols 0 to 2 write bytes as Latin-1 text
}
_CONSTANTS = {"EMPTY_TUPLE": (), "NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = frozenset(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"))
_TEXTS = frozenset(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"))
_LITERALS = _NUMBERS | _TEXTS | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING_TO_DO = frozenset(("PROTO", "FRAME"))
_MARK = object()


@dataclass(frozen=True)
class _Symbol:
    name: str


@dataclass
class _DType:
    code: str
    order: str = "="

    def numpy(self) -> np.dtype[Any]:
        if self.code[:1] not in ("b", "i", "u", "f") or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"arrays of {self.code!r} ({self.order!r}); expected numbers")
        try:
            return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(f"arrays of {self.code!r}; expected numbers") from None


@dataclass
class _Array:
    value: np.ndarray | None = None


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a pickled `dict[str, array]`, protocols 0 to 5, by numpy 1 or 2; they may be read-only.

    Raises:
        ValueError: the pickle is damaged, larger than MAX_BYTES, or holds anything but str -> arrays (or numpy
            scalars, which become arrays of shape ()) of booleans, integers or floats.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"the pickle has {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        top = _run(data)
    except (IndexError, KeyError):  # an empty stack, an unknown memo
        raise ValueError("the pickle is damaged") from None
    if not isinstance(top, dict):
        raise ValueError(f"the pickle holds a {_kind(top)}; expected a dict of numpy arrays")
    arrays = {}
    for name, value in top.items():
        if not isinstance(value, _Array) or value.value is None:
            raise ValueError(f"{name!r} in the pickle is a {_kind(value)}; expected a numpy array")
        arrays[name] = value.value
    return arrays


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    encoded = 0
    # genops parses without building; it counts every length against the bytes that are there.
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(_top(stack, _TUPLES[name]))]
        elif name == "TUPLE":
            stack.append(tuple(_above_mark(stack)))
        elif name == "DICT":
            stack.append(_set_items({}, _above_mark(stack)))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = _above_mark(stack)
            _set_items(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_symbol(str(argument)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_symbol(f"{module} {attribute}" if isinstance(module, str) else "?"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            value = _call(function, arguments)
            encoded += len(value) if isinstance(value, bytes) else 0
            if encoded > len(data):  # the same text again and again
                raise ValueError("the pickle asks for more bytes than it has")
            stack.append(value)
        elif name == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif name not in _NOTHING_TO_DO:
            raise ValueError(f"the pickle uses {name}, which no dict of numpy arrays needs; it is not read")
    raise AssertionError("genops ends with STOP or raises")


def _top(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count or any(value is _MARK for value in stack[-count:]):
        raise IndexError
    return stack[-count:]


def _above_mark(stack: list[Any]) -> list[Any]:
    for place in range(len(stack) - 1, -1, -1):
        if stack[place] is _MARK:
            above = stack[place + 1 :]
            del stack[place:]
            return above
    raise IndexError


def _set_items(target: Any, items: list[Any]) -> dict[str, Any]:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("the pickle is damaged")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):  # hashing nested tuples can take forever
            raise ValueError(f"a key in the pickle is a {_kind(key)}; expected text")
        target[key] = value
    return target


def _symbol(name: str) -> _Symbol:
    if name not in _SYMBOLS:
        raise ValueError(f"the pickle refers to {name!r:.200}; only numpy arrays are read, nothing is imported")
    return _Symbol(_SYMBOLS[name])


def _call(function: Any, arguments: Any) -> Any:
    match (function.name if isinstance(function, _Symbol) else None), arguments:
        case "encode", (str() as text, "latin1" | "latin-1"):
            return text.encode("latin-1")
        case "dtype", (str() as code, bool() | int(), bool() | int()):
            return _DType(code)
        case "scalar", (_DType() as dtype, bytes() as raw):
            return _Array(_array(raw, dtype, (), "C"))
        case "frombuffer", (bytes() | bytearray() as raw, _DType() as dtype, tuple() as shape, "C" | "F" as order):
            return _Array(_array(raw, dtype, shape, order))
        case "reconstruct", (_Symbol("ndarray"), tuple(), _):
            return _Array()
    raise ValueError("the pickle calls what is not a numpy array's constructor; nothing is called")


def _build(target: Any, state: Any) -> None:
    match target, state:
        case _DType(), (int(), str() as order, None, None, None, *_):
            target.order = order
            return
        case _Array(None), (
            int(),
            tuple() as shape,
            _DType() as dtype,
            bool() | int() as fortran,
            bytes() as raw,
        ):
            target.value = _array(raw, dtype, shape, "F" if fortran else "C")
            return
    raise ValueError("the state of an array in the pickle is not that of numbers")


def _array(raw: bytes | bytearray, dtype: _DType, shape: tuple[Any, ...], order: Any) -> np.ndarray:
    kind = dtype.numpy()
    if len(shape) > 8 or not all(type(side) is int and 0 <= side <= MAX_BYTES for side in shape):
        raise ValueError(f"an array in the pickle has the shape {str(shape)[:80]}")
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"an array of shape {str(shape)[:80]} and dtype {kind} in the pickle has {len(raw)} bytes")
    if not raw:
        return np.empty(shape, kind)
    return np.frombuffer(raw, kind).reshape(shape, order=order)


def _kind(value: Any) -> str:
    return "numpy dtype or function" if isinstance(value, (_DType, _Symbol)) else type(value).__name__
