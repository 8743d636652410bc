"""The memory that tensors take while they are alive."""

from __future__ import annotations

import torch

from benchmarks.live_bytes import LiveBytes


def test_what_lives_is_counted_and_what_is_gone_is_not() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        view = kept[10:]
        torch.zeros(500).add_(1)
        more = kept + 1
        assert (live.now, live.most) == (8000, 8000)
        del more
        assert live.now == 4000
        del kept
        assert live.now == 4000  # a view holds it
        del view
    assert (live.now, live.most) == (0, 8000)
