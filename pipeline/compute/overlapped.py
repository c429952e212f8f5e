"""Micro-batches that go through a block two at a time, each as it would alone.

While one is in a stretch of its program that uses a single core, another's products, or the sums
over what came before, keep the rest busy. All run the same programs on XLA's one pool of threads:
which of them is first changes no bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

AT_ONCE = 2
"""More would each hold its attention's scores, and win little."""


def overlapped(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Generator[_Result]:
    """`map`, some items ahead of who takes the results, in their order.

    On an accelerator, which runs one program after the other, it is no more than `map`.

    Raises:
        Exception: what `function` raised, in its item's turn; later ones that were begun end first.
    """
    if jax.default_backend() != "cpu":
        yield from map(function, items)
        return
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="batch") as pool:
        begun: deque[Future[_Result]] = deque()
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > AT_ONCE:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
