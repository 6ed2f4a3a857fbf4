"""The block pool: counting, sharing, finding, forgetting, and eviction in the order of last use."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from reprise.engine.block_pool import ROOT_DIGEST, BlockPool, block_digest


def digest(number: int) -> bytes:
    return block_digest(ROOT_DIGEST, [number])


def test_a_digest_names_tokens_and_everything_before_them() -> None:
    first = block_digest(ROOT_DIGEST, [1, 2])
    assert first == block_digest(ROOT_DIGEST, [1, 2])
    assert first != block_digest(ROOT_DIGEST, [2, 1])
    assert block_digest(first, [3]) != block_digest(ROOT_DIGEST, [3])


def test_blank_blocks_go_first_then_the_least_recently_released() -> None:
    pool = BlockPool(4, 2)
    a, b, c, d = pool.allocate(4)
    for block in (a, b, c):
        pool.register(block, digest(block))
    pool.release([b])
    pool.release([d])
    pool.release([a])
    assert pool.allocate(1) == [d]
    assert pool.allocate(1) == [b]
    assert pool.find(digest(b)) is None
    assert pool.find(digest(a)) == a
    pool.check([[c], [d], [b]])


def test_a_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(2, 2)
    (block,) = pool.allocate(1)
    pool.register(block, digest(1))
    pool.share(block)
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert (pool.num_free, pool.num_cached) == (2, 1)
    pool.share(block)
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.check([[block]])


def test_a_forgotten_block_is_not_found() -> None:
    pool = BlockPool(2, 2)
    (block,) = pool.allocate(1)
    pool.register(block, digest(1))
    pool.release([block])
    pool.forget([block])
    assert pool.find(digest(1)) is None
    assert pool.num_cached == 0
    pool.check()


def test_check_sees_a_lost_block() -> None:
    pool = BlockPool(2, 2)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check([])


class BlockPoolMachine(RuleBasedStateMachine):
    """Random owners allocate, share, register, forget and release; every rule holds after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 2)
        self.tables: list[list[int]] = []

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            held = {block for table in self.tables for block in table}
            blocks = self.pool.allocate(count)
            assert not held.intersection(blocks)
            self.tables.append(blocks)

    @rule(number=st.integers(0, 5))
    def share(self, number: int) -> None:
        block = self.pool.find(digest(number))
        if block is not None:
            self.pool.share(block)
            self.tables.append([block])

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), number=st.integers(0, 5))
    def register(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from([b for table in self.tables for b in table]))
        self.pool.register(block, digest(number))

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.pool.forget([data.draw(st.sampled_from([b for table in self.tables for b in table]))])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(reversed(table))

    @invariant()
    def holds(self) -> None:
        self.pool.check(self.tables)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
