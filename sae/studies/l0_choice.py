"""From what dictionaries of several L0 have in common to one L0, with a band."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

BELIEVED = 0.9
"""Share of the best candidate's score from which another one has a say in the band."""
LEVELS = (0.6, 0.5, 0.4)
"""How reproducible the last latent of a row is to be, as a share of the most reproducible: the lower end of
the band, the value, the upper end."""


@dataclass(frozen=True)
class Candidate:
    """What dictionaries trained at one L0 say; over seeds, or over pairs of seeds."""

    l0: float
    projection: float
    """The proxy s_n^dec (mean over seeds)."""
    projection_se: float
    mean_cosine: float
    """c_dec (mean over seeds)."""
    agreement: float
    """Mean cosine of matched directions (mean over pairs of seeds)."""
    shared: tuple[tuple[float, ...], ...]
    """Of every pair: `shared_firings`, at m = 1, 2, ..."""

    @property
    def counts(self) -> list[int]:
        """Of every pair, the number of latents a row up to which further ones are shared."""
        return [knee(curve, 0.5) for curve in self.shared]

    @property
    def score(self) -> float:
        """Shared firings times the share that is shared, at the count; mean over pairs."""
        scores = [max(curve[m - 1], 0.0) ** 2 / m for curve, m in zip(self.shared, self.counts, strict=True)]
        return sum(scores) / len(scores)


@dataclass(frozen=True)
class L0Choice:
    """An L0 that the data ask for, and how sure that is."""

    value: int
    low: int
    high: int
    table: tuple[Candidate, ...]
    most: int
    """The largest that could have been chosen."""

    @property
    def at_the_edge(self) -> bool:
        """Whether the value or its band ends where the search ended, so that more may be right."""
        return self.high >= self.most

    @property
    def best(self) -> Candidate:
        """The candidate whose dictionaries have most in common."""
        return max(self.table, key=lambda row: row.score)

    def __str__(self) -> str:
        edge = f"; at the edge of the grid, {self.most}: widen it" if self.at_the_edge else ""
        return f"L0 chosen from the data: {self.value} ({self.low} to {self.high}){edge}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("l0", "projection", "projection_se", "mean_cosine", "agreement", "score", "counts")
        table = [{name: getattr(row, name) for name in names} for row in self.table]
        return {
            **{name: getattr(self, name) for name in ("value", "low", "high", "most", "at_the_edge")},
            "candidates": table,
        }

    def as_table(self) -> str:
        """The candidates in lines; `*` = most in common, `p` = least projection, `a` = most agreement."""
        least = min(self.table, key=lambda row: row.projection)
        agreed = max(self.table, key=lambda row: row.agreement)
        lines = [f"{'L0':>7}{'projection':>18}{'cosine':>9}{'agreement':>11}{'shared':>9}  latents a row"]
        for row in self.table:
            marks = [mark for mark, one in (("*", self.best), ("p", least), ("a", agreed)) if one is row]
            lines.append(
                f"{row.l0:7.2f}{f'{row.projection:.4f} ± {row.projection_se:.4f}':>18}{row.mean_cosine:9.4f}"
                f"{row.agreement:11.3f}{row.score:9.2f}  {', '.join(map(str, row.counts))} {''.join(marks)}"
            )
        return "\n".join([*lines, str(self)])


def knee(shared: tuple[float, ...], level: float) -> int:
    """The first m beyond which further latents are shared in less than `level` of what they could be.

    With S(m) being `shared_firings`: (S(m + w) - S(m)) / w < level * max(S(j) / j), over a window w of a
    quarter of m. Where that never happens, the last m.

    >>> knee((1.0, 2.0, 3.0, 3.2, 3.4), 0.5)
    3
    """
    best = max(s / m for m, s in enumerate(shared, start=1))
    for m in range(1, len(shared)):
        end = min(len(shared), m + max(1, round(m / 4)))
        if (shared[end - 1] - shared[m - 1]) / (end - m) < level * best:
            return m
    return len(shared)


def decide(table: tuple[Candidate, ...]) -> L0Choice:
    """The count of the candidate whose dictionaries share most; the band from all that share nearly as much.

    The band reaches over all their pairs of seeds, and over how reproducible the last latent must be
    (`LEVELS`). Projection and agreement are reported and decide nothing. On worlds of 128 directions in 48
    dimensions, 2, 3, 4, 6 or 8 of them in a row, and 600 steps per dictionary, this gives exactly those
    numbers; the projection was least at 16 for all of them, and the agreement of seeds was largest at a
    half to all of the right number, since fewer latents a row are found more easily. With half as many
    latents as directions, it gives 5 (4 to 8) for 4 and 7 (6 to 9) for 8.
    """
    best = max(table, key=lambda row: row.score)
    value = round(math.exp(sum(math.log(m) for m in best.counts) / len(best.counts)))
    believed = [row for row in table if row.score >= BELIEVED * best.score]
    ends = [knee(curve, level) for row in believed for curve in row.shared for level in LEVELS]
    most = len(best.shared[0])
    return L0Choice(value, min([value, *ends]), max([value, *ends]), table, most)
