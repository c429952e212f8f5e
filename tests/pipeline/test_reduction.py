"""The additions are the same however the shards are spread over workers."""

import pytest

from pipeline.reduction import join, reduce_subtree, split
from quantizer import tree_merge


def paired(left, right):
    return f"({left}+{right})"


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 5, 7, 8, 13, 32, 33])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 8, 40])
def test_every_split_adds_what_tree_merge_adds(num_leaves, num_workers):
    shares = split(num_leaves, num_workers)
    subtrees = [subtree for share in shares for subtree in share]
    assert [leaf for subtree in subtrees for leaf in subtree] == list(range(num_leaves))
    sums = [reduce_subtree(subtree, str, paired) for subtree in subtrees]
    assert join(sums, paired) == tree_merge([str(i) for i in range(num_leaves)], paired)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 8])
def test_every_worker_gets_shards_if_there_are_enough(num_workers):
    shares = split(32, num_workers)
    assert all(shares)
    loads = [sum(map(len, share)) for share in shares]
    assert max(loads) <= 2 * min(loads)


def test_a_subtree_holds_few_sums_at_once():
    alive = most = 0

    def leaf(index):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return index

    def merge(left, right):
        nonlocal alive
        alive -= 1
        return left + right

    [[subtree]] = split(32, 1)
    assert reduce_subtree(subtree, leaf, merge) == sum(range(32))
    assert most <= 6
