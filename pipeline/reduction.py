"""The shape of a reduction: which sums are added to which, however they are spread over workers.

Floating-point addition is not associative, so the number of calibration shards alone fixes the tree
(`quantizer.tree_merge` has the same one). Workers reduce whole subtrees; the rest of the tree joins
their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

_Sum = TypeVar("_Sum")


def split(num_leaves: int, num_workers: int) -> list[list[range]]:
    """Split the tree over `num_leaves` leaves into subtrees for each worker, in leaf order.

    A subtree is given by its leaves. All but the last have one size: the largest with which every
    worker gets a subtree, if there are enough leaves.
    """
    size = 1
    while size < num_leaves and -(-num_leaves // (2 * size)) >= num_workers:
        size *= 2
    subtrees = [range(a, min(a + size, num_leaves)) for a in range(0, num_leaves, size)]
    shares: list[list[range]] = []
    taken = 0
    for worker in range(num_workers):
        count = -(-(len(subtrees) - taken) // (num_workers - worker))
        shares.append(subtrees[taken : taken + count])
        taken += count
    return shares


def reduce_subtree(
    subtree: range, leaf: Callable[[int], _Sum], merge: Callable[[_Sum, _Sum], _Sum]
) -> _Sum:
    """The sum of one subtree, holding at most one unmerged sum for each of its levels."""
    # Like carrying in binary: two finished sums of one level make one of the next.
    pending: list[tuple[int, _Sum]] = []
    for index in subtree:
        level, total = 0, leaf(index)
        while pending and pending[-1][0] == level:
            total = merge(pending.pop()[1], total)
            level += 1
        pending.append((level, total))
    total = pending.pop()[1]
    # The ragged end: a node without a neighbour rises unmerged until it meets one.
    while pending:
        total = merge(pending.pop()[1], total)
    return total


def halves(subtree: range) -> tuple[range, range]:
    """The two nodes below a subtree of several leaves: the left is the largest whole one."""
    middle = subtree.start + (1 << (len(subtree) - 1).bit_length() - 1)
    return range(subtree.start, middle), range(middle, subtree.stop)


def join(sums: Sequence[_Sum], merge: Callable[[_Sum, _Sum], _Sum]) -> _Sum:
    """Reduce the tree above the subtrees, whose sums are given in leaf order."""
    level = list(sums)
    while len(level) > 1:
        pairs = [merge(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]
