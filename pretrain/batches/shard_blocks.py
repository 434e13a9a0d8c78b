"""Keep decoded blocks of shards in memory, so that each is read once while it is in use."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future

import numpy as np

from data_prep.shards.format import BucketExtent
from data_prep.shards.reader import DamagedBlock, ShardSet

logger = logging.getLogger(__name__)


class BlockCache:
    """A cache of decoded blocks that any number of threads may use.

    Parameters
    ----------
    max_blocks
        Number of blocks to keep; the least recently used one is dropped first.
    quarantine
        Return damaged blocks as None, so that their cells are left out, instead of raising.
    """

    def __init__(self, shards: ShardSet, max_blocks: int, quarantine: bool) -> None:
        self._shards = shards
        self._max_blocks = max_blocks
        self._quarantine = quarantine
        self._token_type = np.uint16 if shards.vocabulary.num_tokens <= 2**16 else np.uint32
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future] = OrderedDict()
        self.blocks_read = 0

    def block(self, number: int) -> tuple[np.ndarray, list[int]] | None:
        """Return (tokens, offsets) of a block; None if it is damaged and quarantined."""
        with self._lock:
            known = self._blocks.get(number)
            if known is None:
                mine = self._blocks[number] = Future()
                if len(self._blocks) > self._max_blocks:
                    self._blocks.popitem(last=False)
            else:
                self._blocks.move_to_end(number)
        if known is not None:
            return known.result()
        try:
            mine.set_result(self._read(number))
        except BaseException as error:
            mine.set_exception(error)
            raise
        return mine.result()

    def _read(self, number: int) -> tuple[np.ndarray, list[int]] | None:
        self.blocks_read += 1
        try:
            block = self._shards.read_block(number)
        except DamagedBlock as error:
            if not self._quarantine:
                raise
            logger.warning("quarantined: %s", error)
            return None
        return block.tokens, block.offsets.tolist()

    def gather(self, extent: BucketExtent, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of cells of one bucket, one cell after another, and where each begins.

        The second array is int64 [cells + 1]. Cells of a quarantined block have no tokens; every
        other cell has at least one.
        """
        numbers, places = extent.locate(cells)
        blocks = {n: self.block(n) for n in np.unique(numbers).tolist()}
        parts = [np.zeros(0, dtype=self._token_type)]
        offsets = np.zeros(len(cells) + 1, dtype=np.int64)
        for i, (number, place) in enumerate(zip(numbers.tolist(), places.tolist(), strict=True)):
            if block := blocks[number]:
                tokens, starts = block
                start, stop = starts[place], starts[place + 1]
                parts.append(tokens[start:stop])
                offsets[i + 1] = stop - start
        return np.concatenate(parts), np.cumsum(offsets)
