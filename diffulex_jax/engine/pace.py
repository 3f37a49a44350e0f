"""How prompts and requests that decode share a device: a flood of prompts makes the latter take half as long again, at about the most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


_MOST_STEPS = 2  # what is put between steps takes as long as so many of them
_SHARE = 2  # and is followed by so many times its own time of them

CREDIT = 14
"""Steps that prompts may have in advance, where none came for as long: so a burst of them passes at once, and a flood does not."""


class Pace(NamedTuple):
    """What goes between denoise steps.

    A forward over ``n`` tokens is taken to cost ``free + n``: with few of them, what reading the weights does.

    Attributes:
      budget: tokens of prompts at the most.
      sizes: tokens of the forwards over prompts that are compiled, in order; fewer cost as many.
      free: see above.
    """

    budget: int
    sizes: Sequence[int]
    free: int

    def prompts(self, decoding: int, credit: int = 0) -> int:
        """Tokens of prompts to compute at once while steps over ``decoding`` tokens wait: those of one forward or of several of the
        largest, as many as cost no more than two steps, or than what ``credit`` steps pay for, but at least the smallest."""
        room, largest = max(_MOST_STEPS, credit // _SHARE) * (self.free + decoding), self.sizes[-1]
        one = max((size for size in self.sizes if self.free + size <= room), default=self.sizes[0])
        return min(self.budget, max(one, room // (self.free + largest) * largest))

    def steps(self, prompts: int, decoding: int) -> int:
        """Steps over ``decoding`` tokens that come before the next prompts, behind ``prompts`` tokens of some; 0 where nothing decodes."""
        if not decoding:
            return 0
        cost = -(-prompts // self.sizes[-1]) * self.free + prompts
        return -(-_SHARE * cost // (self.free + decoding))
