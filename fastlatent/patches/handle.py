"""What a patch has replaced in a model, and the way back."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

_MISSING = object()
_MARK = "_fastlatent_patch"  # on a patched model: its handle


class _Replacement:
    """Our method in an object's place. Copies and pickles of the object get the method that it had before."""

    def __init__(self, ours: Any, owner: Any, name: str) -> None:
        functools.update_wrapper(self, getattr(owner, name), updated=())
        self._ours, self._owner, self._name = ours, owner, name
        self._before = vars(owner).get(name, _MISSING)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ours(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # The copy of the owner exists already when its attributes are copied; getattr finds its class's method there.
        if self._before is _MISSING:
            return getattr, (self._owner, self._name)
        return _itself, (self._before,)


def _itself(value: Any) -> Any:
    return value


class PatchHandle:
    """A model whose sampling loop is ours until `undo`; a context manager that undoes at its end.

    Nothing is registered with the modules: state_dict, parameters and devices stay the model's own. A copy or a pickle
    of the model has the model's own loop, and is not patched.

    Attributes:
        family: whose model it was found to be.
        replaced: dotted names of the methods that are ours now.
    """

    def __init__(self, model: Any, family: str) -> None:
        there = vars(model).get(_MARK)
        if there is not None:
            raise ValueError(
                f"patch: expected a model that is not patched, got one that is ({there!r}); undo that first"
            )
        self.family, self.replaced = family, []
        self._saved: list[tuple[Any, str, Any]] = []
        self._set(model, _MARK, self)

    replaced: list[str]

    def replace(self, owner: Any, name: str, ours: Any, where: str = "") -> None:
        """Put `ours` in the place of the method owner.name, of this object only; `where`: dotted path to the owner."""
        assert callable(getattr(owner, name)), name
        self._set(owner, name, _Replacement(ours, owner, name))
        self.replaced.append(f"{where}.{name}" if where else name)

    def undo(self) -> None:
        """Give every method back; a second call does nothing."""
        while self._saved:
            owner, name, before = self._saved.pop()
            if before is _MISSING:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = before

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._saved.append((owner, name, vars(owner).get(name, _MISSING)))
        vars(owner)[name] = value  # past nn.Module.__setattr__: neither parameter nor module

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the model is not patched

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"PatchHandle({self.family}: {', '.join(self.replaced)})"
