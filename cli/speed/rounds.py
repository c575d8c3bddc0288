"""Rounds: ours and what it is measured against, one after another, again and again.

What else the machine does then falls on all alike, and ratios are taken within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

__all__ = ["Reference", "Row", "Work", "compare", "limit", "peer", "seconds"]

Work = Callable[[], float]
"""Does its work and says how many seconds it took, without preparation and tidying up."""


@dataclass(frozen=True)
class Reference:
    """What something is measured against.

    Attributes
    ----------
    name : str
    run : callable, optional
        None: it is not here, for the reason in `missing`.
    missing : str
    """

    name: str
    run: Work | None
    missing: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table: medians, and ratios of speeds within rounds.

    Attributes
    ----------
    group, what, against : str
    seconds, its_seconds : float, optional
        Medians. None where it was not measured, and `note` says why.
    ratio, low, high : float, optional
        Median, least and greatest of its seconds over ours.
    target : float, optional
        The least that the ratio is to be.
    rounds : int
    amount : float, optional
        How much was done in those seconds, in `unit`.
    unit : str
    note : str
    peak_bytes : int, optional
        The most that the process held.
    failed : bool
        The group broke off here, and `note` says why.
    """

    group: str
    what: str
    against: str = ""
    seconds: float | None = None
    its_seconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    target: float | None = None
    rounds: int = 0
    amount: float | None = None
    unit: str = ""
    note: str = ""
    peak_bytes: int | None = None
    failed: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none, or nothing was measured."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio >= self.target

    def document(self) -> dict[str, Any]:
        """Everything, JSON only."""
        return {**asdict(self), "met": self.met}


def seconds(run: Callable[[], Any]) -> Work:
    """A function, timed."""

    def work() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return work


def peer(module: str, package: str, name: str, run: Work) -> Reference:
    """A reference that needs a package, which may not be installed."""
    if find_spec(module) is not None:
        return Reference(name, run)
    return Reference(name, None, f"{package} is not installed: pip install 'actstore[test]'")


def compare(
    group: str,
    ours: Mapping[str, tuple[Work, Mapping[str, float | None]]],
    references: Sequence[Reference],
    rounds: int,
    amount: float | None = None,
    unit: str = "",
    note: str = "",
) -> list[Row]:
    """Measure in rounds, of which the first warms up and is dropped.

    Parameters
    ----------
    group : str
    ours : mapping
        What is measured, each with the names of the references that it is held against, and the
        least that the ratio of speeds, its seconds to ours, is to be, or None.
    references : sequence of Reference
    rounds : int
    amount : float, optional
        How much each does, in `unit`.
    unit, note : str

    Returns
    -------
    list of Row
        One for each of ours and each reference that it is held against.
    """
    work = {("reference", r.name): r.run for r in references if r.run is not None}
    work |= {("ours", name): run for name, (run, _) in ours.items()}
    took: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for number in range(rounds + 1):
        for key, run in work.items():
            spent = run()
            if number:
                took[key].append(spent)
    rows = []
    for name, (_, targets) in ours.items():
        for reference in (r for r in references if r.name in targets):
            own = took["ours", name]
            its = took.get(("reference", reference.name))
            ratios = [b / a for a, b in zip(own, its, strict=True)] if its else None
            rows.append(
                Row(
                    group,
                    name,
                    reference.name,
                    statistics.median(own),
                    statistics.median(its) if its else None,
                    statistics.median(ratios) if ratios else None,
                    min(ratios) if ratios else None,
                    max(ratios) if ratios else None,
                    targets[reference.name],
                    rounds,
                    amount,
                    unit,
                    reference.missing or note,
                )
            )
    return rows


def limit(
    group: str, what: str, run: Work, rounds: int, amount: float, unit: str, note: str = ""
) -> Row:
    """A row of something alone."""
    took = [run() for _ in range(rounds + 1)][1:]
    return Row(
        group,
        what,
        seconds=statistics.median(took),
        rounds=rounds,
        amount=amount,
        unit=unit,
        note=note,
    )
