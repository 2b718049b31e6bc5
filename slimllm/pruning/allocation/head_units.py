"""The steps in which a layer's heads can go."""

from __future__ import annotations

from ...models.shape import ModelShape


class HeadUnits:
    """The steps in which a layer's heads can go, so that every layer keeps regular groups.

    ``group``: a step is a KV head with all its query heads (a plain head where there is no grouping).
    ``query``: a step is one query head out of each KV head's group.
    """

    def __init__(self, shape: ModelShape, head_unit: str, divisor: int = 0):
        group_size = shape.heads // shape.kv_heads
        self.by_query = head_unit == "query" and group_size > 1
        self.steps = group_size if self.by_query else shape.kv_heads
        self.units = shape.heads if self.by_query else shape.kv_heads  # what the search chooses from
        self.groups = shape.kv_heads if self.by_query else 1  # runs of units that lose the same number
        self._shape, self._divisor = shape, divisor

    def widths(self, kept_steps: int) -> tuple[int, int]:
        """(query heads, KV heads) that a layer with this many steps has."""
        heads = self._shape.heads // self.steps * kept_steps
        return heads, self._shape.kv_heads if self.by_query else kept_steps

    def kept_steps(self, ratio: float, round_to: int) -> int:
        """Steps kept at ``ratio``: steps - round(ratio * steps), at least one, or the nearest that :meth:`allowed_steps` has."""
        wanted = self.steps - round(ratio * self.steps)
        if round_to == 1 and not self._divisor:
            return max(1, wanted)
        return min(self.allowed_steps(round_to), key=lambda n: (abs(n - self.steps * (1 - ratio)), -n))

    def allowed_steps(self, round_to: int) -> list[int]:
        """The numbers of steps at which heads x head size is a multiple of ``round_to`` and the heads divide ``divisor``."""

        def allowed(heads):
            return heads * self._shape.head_dim % round_to == 0 and self._divisor % heads == 0

        return [n for n in range(1, self.steps + 1) if allowed(self.widths(n)[0])]
