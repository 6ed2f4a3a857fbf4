"""Which block of the KV pool belongs to whom: reference counts, the prefix index, eviction. Ints and no tensors.

Rules that live here:
 1. A block is free (no reference) or in use (one or more). Free blocks keep their prefix digest until reused.
 2. A digest names at most one block. Free blocks are reused least recently released first, so a useful prefix
    survives longest; blocks without a digest go before all others.
 3. Whole blocks alone get a digest, and nobody but the step that gave it writes to a block that has one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

DIGEST_BYTES = 16
ROOT_DIGEST = b"\0" * DIGEST_BYTES


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a whole block: of its token ids and of everything before them.

    A cryptographic hash, since a collision that a client could provoke would show it another prompt's cache.
    """
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._blank: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, those that hold a reusable prefix included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that hold a reusable prefix."""
        return len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks. The caller has checked `num_free`."""
        assert count <= self.num_free
        blocks = []
        for _ in range(count):
            block, _ = (self._blank or self._cached).popitem(last=False)
            self.forget([block])
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def find(self, digest: bytes) -> int | None:
        """The block of that digest, in use or free."""
        return self._by_digest.get(digest)

    def share(self, block: int) -> None:
        """Add a reference to a block that `find` gave."""
        if self._references[block] == 0:
            self._blank.pop(block, None)
            self._cached.pop(block, None)
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each. Give a sequence's blocks last first: its prefix then survives longest."""
        for block in blocks:
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block] == 0:
                (self._blank if self._digests[block] is None else self._cached)[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Make a whole block findable. No effect where the digest names a block already."""
        if digest not in self._by_digest and self._digests[block] is None:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop the digests of these blocks: what they hold is not to be found again."""
        for block in blocks:
            digest = self._digests[block]
            if digest is not None:
                del self._by_digest[digest]
                self._digests[block] = None
                if block in self._cached:
                    del self._cached[block]
                    self._blank[block] = None

    def check(self, owners: Iterable[Sequence[int]] = ()) -> None:
        """Assert every rule of this file, given the block tables of all sequences."""
        counts = [0] * self.num_blocks
        for table in owners:
            for block in table:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from the block tables"
        free = [*self._blank, *self._cached]
        assert len(set(free)) == len(free)
        assert set(free) == {block for block, count in enumerate(counts) if count == 0}
        assert all(self._digests[block] is None for block in self._blank)
        assert all(self._digests[block] is not None for block in self._cached)
        named = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert named == self._by_digest
