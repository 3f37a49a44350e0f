"""How many pages the KV pool has."""

from __future__ import annotations

import jax


_CACHED_PAGES = 8  # pages at the most, in times of what the slots need
_BITS = 6  # of the number of pages, where the memory decides it


def default_num_pages(device: jax.Device, page_bytes: int, *, needed: int, share: float) -> int:
    """How many pages of ``page_bytes`` to make, now that the parameters are on the device.

    ``share`` of what accelerators have left, less a tenth of their memory for the step's temporaries, up to eight times ``needed``:
    beyond that even a prefix cache gains nothing. A CPU shares its memory with everything else; there it is what all slots need.

    An allocator that did not take all memory at once (``XLA_PYTHON_CLIENT_PREALLOCATE=false``) holds what it once took, in pieces: that is
    of use for temporaries, not for a pool, which is two arrays in one piece each.

    What is left differs a little from start to start, and programs are compiled for a pool of one size: so up to a 32nd is given away for
    one that the next start will find again.

    Raises:
      ValueError: when no page fits.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return needed
    limit, taken, held = stats["bytes_limit"], stats["bytes_in_use"], stats.get("pool_bytes", 0)
    if held < limit:
        taken = max(taken, held)
    free = int(share * (0.9 * limit - taken))
    if free < page_bytes:
        raise ValueError(f"no KV page fits: {taken / 2**30:.1f} of {limit / 2**30:.1f} GiB are taken on {device}")
    fitting = free // page_bytes
    step = 2 ** max(0, fitting.bit_length() - _BITS)
    return min(fitting // step * step, _CACHED_PAGES * needed)
