"""Progress of transformers' weight loading as numbers instead of a bar drawn on somebody's terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from transformers.utils import logging as transformers_logging


class _Bar:
    """As much of a progress bar as loaders use: iteration, `update`, a context manager."""

    def __init__(self, iterable: Iterable[Any] | None, total: float | None, report: Callable[[float], None]) -> None:
        self._iterable = iterable
        self._total = total if total is not None else (len(iterable) if hasattr(iterable, "__len__") else None)  # type: ignore[arg-type]  # asked one clause before
        self._report = report
        self._done = 0.0
        self._reported = 0.0

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.update()

    def update(self, n: float | None = 1) -> None:
        self._done += n or 0
        share = min(1.0, self._done / self._total) if self._total else 0.0
        if share - self._reported >= 0.05 or share == 1.0 > self._reported:
            self._reported = share
            self._report(share)

    def close(self) -> None: ...

    def set_postfix(self, *_: object, **__: object) -> None: ...

    def set_description(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


@contextmanager
def loading_weights(report: Callable[[float], None]) -> Iterator[None]:
    """While it lasts, transformers' loading bars call `report` with the share done, 0 to 1, and draw nothing."""

    def hook(_factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bar:
        return _Bar(args[0] if args else kwargs.get("iterable"), kwargs.get("total"), report)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
