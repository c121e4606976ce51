"""Is freed memory really given back?"""

from __future__ import annotations

import psutil
import pytest
import torch

from peer.memory import release_freed_memory


def test_pages_below_a_block_in_use_are_given_back() -> None:
    blocks = [torch.ones(16 * 1024) for _ in range(1600)]  # 64 KiB each, 100 MiB together
    last = blocks[-1]  # lies above the others, so glibc by itself keeps what is below
    del blocks
    process = psutil.Process()
    before = process.memory_info().rss
    if not release_freed_memory():
        pytest.skip("the C library has no malloc_trim")
    assert before - process.memory_info().rss > 50 * 2**20
    assert last.sum().item() == 16 * 1024
