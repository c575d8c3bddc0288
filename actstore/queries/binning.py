"""How the bins of a histogram come about: given, from the data's range, or by a rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..stats.edges import (
    Extremes,
    automatic_bins,
    even_edges,
    pool_extremes,
    snapped_edges,
)
from ..stats.histogram import Histogram
from ..stats.moments import Moments
from ..stats.quantiles import Quantiles, interpolate
from ..stats.shape import Peaks, Rescale
from .engine import Pass
from .summaries import quantile_passes

__all__ = ["QUARTILES", "Course"]

QUARTILES = (0, 0.25, 0.75, 1)


@dataclass(frozen=True)
class Course:
    """The passes over one stage, and what each makes of the results of the one before.

    Attributes
    ----------
    size : int or None
        Number of bins; None where a rule gives it.
    edges : ndarray or None
        Where they are known beforehand.
    limits : tuple of float or None
        The range, where it is given.
    density, notebook : bool
    transform : str or None
    chosen : ndarray of int
        Neurons asked, of the layer's.
    groups : ndarray of int (neuron,)
        Row of the result for each neuron asked.
    kind : dtype
        Type in which edges are made.
    cap : int
        Most bins by rule.
    search : Quantiles
        The search for the quartiles that the rule needs.
    whole : bool
        Whether a histogram is over a whole layer.
    exact : bool
        Whether sketches know the values themselves, which then have 16 bits.
    snap : bool
        Whether edges are moved to those at which sketches count exactly.
    """

    size: int | None
    edges: np.ndarray | None
    limits: tuple[float, float] | None
    density: bool
    notebook: bool
    transform: str | None
    chosen: np.ndarray
    groups: np.ndarray
    kind: np.dtype[Any]
    cap: int
    search: Quantiles
    whole: bool
    exact: bool
    snap: bool

    def passes(self) -> list[Pass]:
        steps = []
        if self.transform is not None:
            steps.append(Pass(Moments(), whole=True, sketch=True))
        if self.transform == "peak":
            steps.append(Pass(self.look_for_peaks))
        known = self.whole and (self.exact or self.snap) and not steps
        if self.edges is not None:
            given = self.in_given_bins if steps else self.in_given_bins({})
            return [*steps, Pass(given, sketch=known)]
        if self.size is not None:
            ends = [Pass(Extremes(self.groups), sketch=True)]
            return [*(steps or ends), Pass(self.in_even_bins, sketch=known)]
        search = quantile_passes(self.search, self.whole and self.limits is None)
        if steps:
            search[0] = Pass(self.look_for_quartiles)
        return [*steps, *search, Pass(self.in_bins_by_rule, sketch=known)]

    def look_for_peaks(self, moments: dict[str, Any]) -> Peaks:
        kept = self._kept(moments)
        bins, height = 50, (200 if self.notebook else 0.02)
        kind = np.float32 if self.notebook else np.float64
        edges = even_edges(kept["min"].astype(kind), kept["max"].astype(kind), bins)
        own = Histogram(edges, np.arange(len(self.chosen)))
        std = kept["layer_std"]
        return Peaks(own, height, 40, 1.0, std, notebook=self.notebook, extra=kept)

    def look_for_quartiles(self, found: dict[str, Any]) -> Quantiles:
        return replace(self.search, extra={"transform": self._rescale(found)})

    def in_given_bins(self, found: dict[str, Any]) -> Histogram:
        assert self.edges is not None
        return self._histogram(self.edges, self._rescale(found))

    def in_even_bins(self, found: dict[str, Any]) -> Histogram:
        assert self.size is not None
        rescale = self._rescale(found)
        if rescale is not None:
            kept = self._kept(found)
            ends = rescale(np.stack([kept["min"], kept["max"]]))
            found = pool_extremes(ends[0], ends[1], self.groups)
        low, high = found["min"].astype(self.kind), found["max"].astype(self.kind)
        edges = even_edges(low, high, self.size)
        if self.snap:
            moved = snapped_edges(edges[0])  # of a whole layer: one row
            edges = np.full_like(edges, np.nan)
            edges[0, : len(moved)] = moved
        return self._histogram(edges, rescale)

    def in_bins_by_rule(self, found: dict[str, Any]) -> Histogram:
        between = [found[name] for name in ("lower", "upper", "fraction")]
        # numpy takes the difference of neighbours in their own type.
        quartiles = interpolate(*between) if self.notebook else found["quantile"]
        if self.limits is None:
            low, high = found["lower"][:, 0].astype(self.kind), found["upper"][:, -1]
            high = high.astype(self.kind)
        else:
            low, high = (np.full(len(quartiles), end) for end in self.limits)
        sizes, rule = automatic_bins(
            found["count"],
            quartiles[:, 2] - quartiles[:, 1],
            low,
            high,
            cap=self.cap,
            sturges=not self.notebook,
        )
        edges = np.full((len(sizes), self.cap + 1), np.nan, self.kind)
        made = even_edges(low, high, sizes)
        edges[:, : made.shape[1]] = made
        extra = {"n_bins": sizes, "rule": rule}
        return self._histogram(edges, found.get("transform"), extra)

    def _histogram(
        self, edges: np.ndarray, rescale: Rescale | None, extra: dict[str, Any] | None = None
    ) -> Histogram:
        return Histogram(edges, self.groups, self.density, rescale, extra or {})

    def _kept(self, found: dict[str, Any]) -> dict[str, Any]:
        """Moments of the neurons asked, and the spread of all of them."""
        if "layer_std" in found:
            return found
        names = ("mean", "std", "min", "max")
        own = {name: found[name][self.chosen] for name in names}
        return {**own, "layer_std": float(found["std"].mean())}

    def _rescale(self, found: dict[str, Any]) -> Rescale | None:
        if self.transform is None:
            return None
        kept = self._kept(found)
        centre = kept["position"] if self.transform == "peak" else kept["mean"]
        if self.transform == "center":
            return Rescale(centre, np.ones(len(centre)), 1.0, self.notebook)
        unit = np.where(kept["std"] > 0, kept["std"], np.nan)
        return Rescale(centre, unit, kept["layer_std"], self.notebook)
