"""A report: all figures of a store in one HTML file that asks nobody for anything.

The figures are drawn by the explorer's own code, which the file carries with it beside the results
and plotly.js. Each says which lines of Python and of the command line make it.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from . import __version__
from .errors import UsageError
from .queries import QUERIES, compute
from .select import parse
from .server.browse import Browser
from .store import Store, open_store
from .wire import dumps, to_json

__all__ = ["report"]

_MODULES = (
    "dom.js",
    "format.js",
    "theme.js",
    "commands.js",
    "results.js",
    "fig-base.js",
    "fig-profiles.js",
    "fig-distributions.js",
    "fig-dimensions.js",
    "fig-similarity.js",
    "fig-information.js",
    "fig-layers.js",
    "figures.js",
    "widgets.js",
    "cosines.js",
    "texts.js",
    "report.js",
)
"""Of the explorer, each before those that import it."""

_STATIC = files("actstore.server") / "static"

_DRAWN = 64
"""Tokens of matrices."""

_PASSAGE = 300
_TOP = 12
_BEFORE, _AFTER = 11, 5

_RESIDUAL = ("hidden", "resid_post", "resid_pre", "resid_mid")
_FOCUS = ("mlp_post", *_RESIDUAL, "mlp_out")

_QUANTILES = [0, 0.001, 0.01, *(round(0.02 * i, 2) for i in range(1, 50)), 0.99, 0.999, 1]

_CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


_Ask = tuple[str, Mapping[str, Any]]
"""A query and its parameters."""


@dataclass
class _Panel:
    """One figure: what is asked for it, and how the page's code draws the answers."""

    id: str
    title: str
    figure: str = ""
    asks: Sequence[_Ask] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    span: int = 6
    help: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Chosen:
    """What a report is about: the selection, and one stage, layer and neuron looked at closely."""

    store: Store
    stages: tuple[str, ...]
    layers: Mapping[str, list[int]]
    scope: Mapping[str, str]
    stage: str
    residual: str
    layer: int
    neuron: int
    drawn: np.ndarray

    def at(self, stage: str, layer: int | None = None) -> dict[str, Any]:
        """Parameters of one stage, at one layer or at all that are chosen."""
        numbers = self.layers[stage] if layer is None else [layer]
        every = {"stages": stage, "layers": ",".join(map(str, numbers))}
        return {**every, **{k: v for k, v in self.scope.items() if k == "tokens"}}


def report(
    data: Store | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    stages: str | Sequence[str] | None = None,
    layers: str | Sequence[int] | None = None,
    tokens: str | None = None,
    stage: str | None = None,
    layer: int | None = None,
    neuron: int | None = None,
    title: str | None = None,
) -> Path:
    """Write a report about a store: one HTML file with every figure, live and offline.

    The same store and arguments give the same bytes.

    Parameters
    ----------
    data : Store or path
    path : str or PathLike
        Ends in .html; a file that exists is replaced.
    stages, layers, tokens : optional
        As in queries; default all.
    stage, layer, neuron : optional
        What to look at closely; default a stage of the MLP (else the residual stream), its middle
        layer, and the neuron there that varies most.
    title : str, optional
        Default the store's name.

    Returns
    -------
    Path
        What was written.
    """
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise UsageError(f"a report is a web page: {path.name} should end in .html")
    if path.is_dir():
        raise UsageError(f"{path} exists and is a folder: choose another name")
    store = data if isinstance(data, Store) else open_store(data)
    chosen = _choose(store, stages, layers, tokens, stage, layer, neuron)
    sections = [(name, list(panels)) for name, panels in _sections(chosen)]
    content = _content(chosen, sections, title or store.name.removesuffix(".zarr"), path.name)
    _write(path, _page(content))
    return path


# -- what to show ----------------------------------------------------------------------------------


def _choose(
    store: Store,
    stages: str | Sequence[str] | None,
    layers: str | Sequence[int] | None,
    tokens: str | None,
    stage: str | None,
    layer: int | None,
    neuron: int | None,
) -> _Chosen:
    scope: dict[str, str] = {}
    if stages is not None:
        scope["stages"] = stages if isinstance(stages, str) else ",".join(stages)
    if layers is not None:
        scope["layers"] = layers if isinstance(layers, str) else ",".join(map(str, layers))
    if tokens is not None:
        scope["tokens"] = tokens
    # A cheap question tells what the selection means, and whether it can be asked.
    asked = QUERIES["moments"].function(store, per="layer", **scope)
    names = [str(s) for s in np.atleast_1d(asked["stage"].values)]
    own = store.attrs["capture"]["stages"]
    known = {n: [k for k in own[n]["layers"] if k in asked["layer"].values] for n in names}
    focus = stage or next((s for s in _FOCUS if s in names), names[0])
    at = layer if layer is not None else known.get(focus, [0])[len(known.get(focus, [0])) // 2]
    one = {"stages": focus, "layers": str(at), **({"tokens": tokens} if tokens else {})}
    spread = compute(QUERIES["moments"].function(store, **one))["std"].values.ravel()
    if neuron is None:
        neuron = int(np.nanargmax(spread)) if np.isfinite(spread).any() else 0
    elif not 0 <= neuron < len(spread):
        raise UsageError(f"neuron {neuron} is not there: {focus} has {len(spread):,}")
    mask = np.ones(store.n_tokens, bool)
    if tokens is not None:
        expression = parse(tokens)
        mask = expression.evaluate({n: store.column(n) for n in expression.columns})
    picked = np.flatnonzero(mask)
    if len(picked) > _DRAWN:
        picked = np.sort(np.random.default_rng(0).choice(picked, _DRAWN, replace=False))
    return _Chosen(
        store=store,
        stages=tuple(names),
        layers=known,
        scope=scope,
        stage=focus,
        residual=next((s for s in _RESIDUAL if s in names), focus),
        layer=at,
        neuron=neuron,
        drawn=picked,
    )


def _sections(c: _Chosen) -> Iterator[tuple[str, Iterator[_Panel]]]:
    yield "Overview", _overview(c)
    yield "Distributions", _distributions(c)
    yield f"A neuron: {c.stage}, layer {c.layer}, neuron {c.neuron}", _neuron(c)
    yield "Dimensionality", _dimensionality(c)
    yield "Similarity", _similarity(c)
    yield "Information", _information(c)
    if any(len(c.layers[s]) > 1 for s in c.stages):
        yield "Layers", _layers(c)


def _overview(c: _Chosen) -> Iterator[_Panel]:
    ask = ("moments", {**c.scope, "per": "layer"})
    yield _Panel("moments", "Moments over layers", "profiles", [ask], span=12)


def _distributions(c: _Chosen) -> Iterator[_Panel]:
    there = ",".join(s for s in c.stages if c.layer in c.layers[s])
    common = {"bins": 400, "approximate": True}
    across = {**c.scope, "stages": there, "layers": str(c.layer), **common}
    options = {"along": "stage", "layer": c.layer}
    asks: list[_Ask] = [("histogram", across)]
    yield _Panel("stages", f"Stages at layer {c.layer}", "histograms", asks, options)
    asks = [("histogram", {**c.at(c.stage), **common})]
    yield _Panel("depth", f"Layers of {c.stage}", "histograms", asks, {"along": "layer"})


def _neuron(c: _Chosen) -> Iterator[_Panel]:
    one = c.at(c.stage, c.layer)
    asks: list[_Ask] = [("moments", one)]
    options = {"picked": c.neuron}
    text = "A point for each neuron."
    yield _Panel("neurons", "All neurons of the layer", "neuronScatter", asks, options, 4, text)
    own = {**one, "neurons": str(c.neuron)}
    browser = Browser(c.store)
    passage: list[dict[str, Any]] = []
    first = 0
    for largest, name in ((True, "largest"), (False, "smallest")):
        params = {**own, "k": _TOP, **({} if largest else {"largest": False})}
        found = compute(QUERIES["top_tokens"].function(c.store, **params))
        places = [found[n].values.ravel() for n in ("token", "sequence", "position")]
        contexts = [
            _context(browser, c, int(sequence), int(position))
            for token, sequence, position in zip(*places, strict=True)
            if token >= 0
        ]
        if largest and contexts:
            first = contexts[0]["sequence"]
            passage = _run(browser, c, first, 0, _PASSAGE)
        asks, more = [("top_tokens", params)], {"contexts": contexts}
        yield _Panel(name, f"It is {name} at", asks=asks, span=4, more=more)
    if passage:
        title = f"Sequence {first:,}, coloured by the neuron"
        yield _Panel("passage", title, span=12, more={"passage": passage})


def _run(
    browser: Browser, c: _Chosen, sequence: int, offset: int, limit: int
) -> list[dict[str, Any]]:
    """Some tokens of a sequence with the neuron's value at each."""
    words = browser.sequence(sequence, offset, limit)["tokens"]
    values = browser.values(sequence, c.stage, c.layer, c.neuron, offset, limit)["values"]
    return [
        {"text": word["text"], "position": word["position"], "value": value}
        for word, value in zip(words, values, strict=True)
    ]


def _context(browser: Browser, c: _Chosen, sequence: int, position: int) -> dict[str, Any]:
    offset = max(0, position - _BEFORE)
    run = _run(browser, c, sequence, offset, position - offset + _AFTER + 1)
    value = next(t["value"] for t in run if t["position"] == position)
    place = {"sequence": sequence, "position": position, "value": value}
    return {**place, "token": f"{sequence}:{position}", "tokens": run}


def _dimensionality(c: _Chosen) -> Iterator[_Panel]:
    asks: list[_Ask] = [("dimensionality", c.scope)]
    text = "Dotted: the participation ratio of normal data of as many tokens."
    yield _Panel("dimensionality", "Over layers", "dimensionProfiles", asks, help=text)
    text = "A point for each stage and layer; fill says the layer, outline the stage."
    title = "Effective dimension against participation ratio"
    yield _Panel("dimension-scatter", title, "dimensionScatter", asks, help=text)
    k = min(200, int(c.store.attrs["capture"]["stages"][c.stage]["width"]))
    asks = [("spectrum", {**c.at(c.stage), "k": k})]
    yield _Panel("spectrum", f"Spectrum of {c.stage}", "spectrum", asks)
    asks = [("intrinsic_dimension", {**c.scope, "n": 1000})]
    text = "Two nearest neighbours, of 1,000 tokens; bars are standard errors."
    yield _Panel("intrinsic", "Intrinsic dimension", "intrinsicProfile", asks, help=text)


def _similarity(c: _Chosen) -> Iterator[_Panel]:
    asks: list[_Ask]
    beside = [s for s in c.stages if s != "hidden"]
    if len(beside) > 1 and set.intersection(*(set(c.layers[s]) for s in beside)):
        asks = [("rsa", {**c.scope, "stages": ",".join(beside)})]
        text = "RSA: how alike two stages find the same pairs of tokens."
        yield _Panel("rsa", "Stages", "pairMap", asks, span=7, help=text)
    if len(c.layers[c.residual]) > 1:
        asks = [("rsa", {**c.at(c.residual), "pairs": "layers"})]
        yield _Panel("rsa-layers", f"Layers of {c.residual}", "layerPairs", asks, span=5)
    numbers = c.layers[c.residual]
    at = min(numbers, key=lambda n: abs(n - c.layer))
    one = c.at(c.residual, at)
    width = int(c.store.attrs["capture"]["stages"][c.residual]["width"])
    asks = [
        ("cosine_pairs", {**one, "quantiles": _QUANTILES}),
        ("gaussian_baseline", {**one, "n": 1000, "dimensions": _dimensions(width)}),
    ]
    title = f"Cosines of pairs of tokens: {c.residual}, layer {at}"
    text = "All pairs of 2,000 tokens. Move the slider to see the pair at that quantile."
    yield _Panel("cosines", title, "cosineDensity", asks, span=12, help=text)


def _dimensions(width: int) -> list[int]:
    """Dimensions of normal data, closer together where they are few."""
    found, d = [], 2
    while d < width:
        found.append(d)
        d = max(d + 1, round(d * 1.25))
    return [*found, width]


def _information(c: _Chosen) -> Iterator[_Panel]:
    if len(c.drawn) < 2:
        return
    rows = np.asarray(c.store.column("input"))[c.drawn]
    drawn = {"tokens": f"input in [{', '.join(map(str, rows.tolist()))}]"}
    words = Browser(c.store).texts(np.asarray(c.store.column("token_id"))[c.drawn])
    texts = [[int(t), str(w)] for t, w in zip(c.drawn, words, strict=True)]
    asks: list[_Ask] = [("mutual_information", {**c.at(c.stage, c.layer), **drawn})]
    both = (
        ("mutual_information", "Mutual information", "bits"),
        ("covariance", "Covariance", "activation²"),
    )
    for variable, name, unit in both:
        options = {"variable": variable, "label": f"{name.lower()} ({unit})"}
        title = f"{name}: {c.stage}, layer {c.layer}"
        text = f"Of every two of {len(c.drawn)} tokens, over their neurons."
        more = {"texts": texts}
        yield _Panel(variable, title, "tokenMatrix", asks, options, help=text, more=more)
    title = "Distributions over the pairs"
    yield _Panel("pair-distributions", title, "pairDistributions", asks, span=7)
    title = "Information against covariance"
    yield _Panel("information-scatter", title, "informationScatter", asks, span=5)
    sweep = {**c.at(c.stage), **drawn, "reduce": "histogram", "reduce_bins": 60}
    asks = [("mutual_information", sweep)]
    yield _Panel("sweep", f"Layers of {c.stage}", "informationSweep", asks, span=12)


def _layers(c: _Chosen) -> Iterator[_Panel]:
    stage = next(s for s in (c.residual, *c.stages) if len(c.layers[s]) > 1)
    asks: list[_Ask] = [("layer_covariance", c.at(stage))]
    for variable, name in (("covariance", "Covariance"), ("r_squared", "Shared variance")):
        title, options = f"{name} of layers of {stage}", {"variable": variable}
        yield _Panel(f"layers-{variable}", title, "layerMatrix", asks, options)


# -- answers ---------------------------------------------------------------------------------------


def _content(
    c: _Chosen, sections: Sequence[tuple[str, list[_Panel]]], title: str, name: str
) -> dict[str, Any]:
    """All that the page is told."""
    asks: dict[str, _Ask] = {}
    for _, panels in sections:
        for panel in panels:
            if panel.figure:
                asks.update({dumps([q, dict(p)]): (q, p) for q, p in panel.asks})
    lazy, problems = {}, {}
    for key, (query, params) in asks.items():
        try:
            lazy[key] = QUERIES[query].function(c.store, **params)
        except UsageError as error:
            problems[key] = str(error)
    computed = compute(*lazy.values())
    answers = computed if len(lazy) > 1 else (computed,)
    order = {key: i for i, key in enumerate(lazy)}

    def described(panel: _Panel) -> dict[str, Any]:
        keys = [dumps([q, dict(p)]) for q, p in panel.asks] if panel.figure else []
        wrong = [problems[k] for k in keys if k in problems]
        return {
            "id": panel.id,
            "title": panel.title,
            "span": panel.span,
            "help": panel.help,
            "note": wrong[0] if wrong else "",
            "figure": "" if wrong else panel.figure,
            "options": dict(panel.options),
            "results": [] if wrong else [order[k] for k in keys],
            "requests": [{"query": q, "params": dict(p)} for q, p in panel.asks],
            **panel.more,
        }

    folder = Path(c.store.path).name
    chosen = " ".join(f"--{k} {v!r}" if " " in v else f"--{k} {v}" for k, v in c.scope.items())
    card = Browser(c.store).card(c.store.name)
    kept = ("name", "id", "tokens", "sequences", "nbytes", "stages")
    return {
        "title": title,
        "folder": folder,
        "version": __version__,
        "command": f"actstore report {folder} --out {name}{' ' + chosen if chosen else ''}",
        "selection": chosen or "all stages, layers and tokens",
        "store": {
            **{k: card[k] for k in kept},
            "model": {k: card["model"].get(k, "") for k in ("name", "class")},
        },
        "results": [to_json(answer) for answer in answers],
        "sections": [
            {"title": name, "panels": [described(p) for p in panels]} for name, panels in sections
        ],
    }


# -- the page --------------------------------------------------------------------------------------


def _page(content: Mapping[str, Any]) -> str:
    from plotly.offline import get_plotlyjs

    data = dumps(content)
    # Within a script element only these could end it, or start a comment.
    for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        data = data.replace(sign, code)
    style = (_STATIC / "style.css").read_text("utf-8")
    parts = [
        "<!doctype html>",
        '<html lang="en" data-theme="light">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{html.escape(content['title'])} · actstore</title>",
        f"<style>\n{style}</style>",
        "</head>",
        '<body><main class="report" id="root">',
        "<noscript>This report needs JavaScript.</noscript></main>",
        f'<script type="application/json" id="report">{data}</script>',
        f"<script>{_script(get_plotlyjs())}</script>",
        f"<script>{_script(_bundle())}</script>",
        "</body></html>",
        "",
    ]
    return "\n".join(parts)


def _script(code: str) -> str:
    """Code as it may stand in a page: nothing in it ends the element."""
    return re.sub(r"</(script)", r"<\\/\1", code, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def _bundle() -> str:
    """The page's modules as one script: each in a function of its own, which gives its exports."""
    parts = ['"use strict";', "const modules = {};"]
    for name in _MODULES:
        code = (_STATIC / name).read_text("utf-8")
        code = re.sub(
            r'^import \{([^}]*)\} from "\./([\w-]+\.js)";',
            lambda m: f'const {{{m[1].replace(" as ", ": ")}}} = modules["{m[2]}"];',
            code,
            flags=re.MULTILINE,
        )
        found = re.findall(r"^export (?:async )?(?:function|const|class) (\w+)", code, re.MULTILINE)
        code = re.sub(r"^export ", "", code, flags=re.MULTILINE)
        parts.append(
            f'modules["{name}"] = (() => {{\n{code}\nreturn {{ {", ".join(found)} }};\n}})();'
        )
    return "\n".join(parts)


def _write(path: Path, text: str) -> None:
    """Under another name until it is whole."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.absolute().parent}; make it first")
    part = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        part.write_text(text, "utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
