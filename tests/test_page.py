"""The page in a real browser, against the real server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import numpy as np
import pytest
from browsing import Watch, chromium, write_hostile
from helpers import bare_corpus, unwritten_store
from playwright.sync_api import Browser, Page, expect

import actstore
from actstore.demo.corpus import demo_records
from actstore.plan import Plan, StageSpec
from actstore.plot.style import STAGE_STYLE, Depth, stage_colour
from actstore.storage import LocalStorage
from actstore.wire import to_csv, to_json

pytestmark = pytest.mark.slow

STAGES = ["hidden", "mlp_in", "mlp_post", "mlp_out"]
TABS = {
    "overview": 5,
    "distributions": 3,
    "neurons": 5,
    "dimensionality": 4,
    "similarity": 6,
    "information": 6,
    "layers": 3,
    "text": 1,
}
"""Panels of each tab."""

SETTLED = ("done", "error", "empty", "waiting", "cancelled")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo store, one of windows with labels, one that is markup, and one that is huge."""
    root = tmp_path_factory.mktemp("page")
    model, tokenizer = actstore.load_model("demo", head=True, device="cpu")
    options = {"stages": STAGES, "name": "demo", "predictions": 8, "outcomes": True}
    actstore.dump(model, tokenizer, demo_records(), root / "demo.zarr", max_tokens=1500, **options)
    actstore.dump(
        model,
        tokenizer,
        demo_records(),
        root / "marks.zarr",
        windows={"internal": ",", "terminal": "."},
        before=6,
        after=4,
        limit=20,
        **options,
    )
    write_hostile(root / "hostile.zarr")
    wide = [
        StageSpec("hidden", tuple(range(48)), 1600),
        StageSpec("mlp_post", tuple(range(48)), 6400),
    ]
    plan = Plan.build(bare_corpus([1000] * 1000), wide, provenance={"model": {"name": "huge"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "free_bytes", lambda storage: 2**50)
        unwritten_store(root / "huge.zarr", plan)
    return root


@pytest.fixture(scope="module")
def demo(stores: Path) -> actstore.Store:
    return actstore.open(stores / "demo.zarr")


@pytest.fixture(scope="module")
def site(stores: Path) -> Iterator[str]:
    """The address of the server, which runs as anyone would run it."""
    command = [sys.executable, "-m", "actstore_cli", "serve", str(stores), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--cache-dir", str(stores / "answers")], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                break
        else:
            pytest.fail("the server did not start")
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": 1280, "height": 900},
        color_scheme="light",
        permissions=["clipboard-read", "clipboard-write"],
    )
    made = context.new_page()
    made.set_default_timeout(20_000)
    made.watch = Watch(made, site)  # type: ignore[attr-defined]
    yield made
    problems = made.watch.problems  # type: ignore[attr-defined]
    context.close()
    assert not problems


def go(page: Page, site: str, tab: str = "overview", **state: Any) -> None:
    """Open a tab and wait until all its panels are there."""
    page.goto("about:blank")
    page.goto(f"{site}/#{urlencode({'store': 'demo', 'tab': tab, **state})}")
    page.wait_for_selector("body[data-ready=true]")
    settle(page)


def settle(page: Page, *, compute: bool = True, seconds: float = 90) -> list[str]:
    """Wait until no panel of the tab is at work, computing what is offered; their states."""
    panels = "[role=tabpanel]:not([hidden]) [data-panel]:not([hidden])"
    end, quiet = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        states = page.eval_on_selector_all(panels, "all => all.map(p => p.dataset.state)")
        if compute and "waiting" in states:  # a busy machine thinks that it takes long
            offers = f"{panels}[data-state=waiting] [data-action=compute]"
            page.eval_on_selector_all(offers, "all => all.forEach(b => b.click())")
            continue
        quiet = quiet + 1 if states and all(s in SETTLED for s in states) else 0
        if quiet == 3:
            return states
        page.wait_for_timeout(60)
    raise AssertionError(f"still at work: {states}")


def state_of(page: Page) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(page.url).fragment))


def drawn(page: Page, panel: str) -> list[dict[str, Any]]:
    """What Plotly was given to draw in a panel."""
    return page.eval_on_selector(
        f"#panel-{panel} .plot",
        "plot => plot.data.map(({name, x, y, z, meta, xaxis}) => ({name, x, y, z, meta, xaxis}))",
    )


def click_cell(page: Page, panel: str, row: int, column: int) -> None:
    """Click a cell of a heat map with the mouse."""
    x, y = page.eval_on_selector(
        f"#panel-{panel} .plot",
        """(plot, [row, column]) => {
            plot.scrollIntoView({block: 'center'});
            const {xaxis, yaxis} = plot._fullLayout;
            const {left, top} = plot.getBoundingClientRect();
            return [left + xaxis._offset + xaxis.c2p(column), top + yaxis._offset + yaxis.c2p(row)];
        }""",
        [row, column],
    )
    page.mouse.move(x - 3, y - 3)
    page.mouse.move(x, y)
    page.wait_for_timeout(150)
    page.mouse.click(x, y)


# -- every tab -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tab", TABS)
def test_every_tab_is_drawn(page, site, tab):
    """No error, no other host (checked at the end of every test), and nothing runs off the side."""
    go(page, site, tab)
    shown = page.locator(f"#tabpanel-{tab} [data-panel]:visible")
    assert shown.count() == TABS[tab]
    assert set(settle(page)) == {"done"}, page.locator(".notice:visible").all_inner_texts()
    plots = page.eval_on_selector_all(
        f"#tabpanel-{tab} .js-plotly-plot", "all => all.map(p => p.querySelectorAll('svg').length)"
    )
    assert all(plots) and (plots or tab == "text")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(120)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    expect(page.locator(f"#tab-{tab}")).to_have_attribute("aria-selected", "true")
    for panel in shown.all():
        if panel.locator(".badge").count():
            assert panel.locator(".badge").inner_text() in ("sketch", "scan")
            assert "tokens" in panel.locator(".meta").inner_text()
            for name in ("JSON", "CSV", "Python", "CLI"):
                expect(panel.get_by_text(name, exact=True)).to_be_visible()


def test_the_card_is_the_stores(page, site, demo):
    go(page, site, "text")
    card = page.locator("#card")
    assert card.locator("[data-card=tokens]").inner_text() == f"{demo.n_tokens:,}"
    assert card.locator("[data-card=predictions]").inner_text() == "top 8"
    assert page.locator("#stages input").count() == len(STAGES)
    page.select_option("#ctl-store", "marks")
    settle(page)
    assert state_of(page)["store"] == "marks"
    marks = actstore.open(Path(demo.path).with_name("marks.zarr"))
    assert card.locator("[data-card=tokens]").inner_text() == f"{marks.n_tokens:,}"
    assert page.get_by_text("condition == 'internal'").is_visible()


def test_stages_and_layers_have_the_librarys_colours(page, site):
    go(page, site, "text")
    names = [*STAGE_STYLE, "block.1.custom", "ünïcode"]
    found = page.evaluate(
        """async (names) => {
            const theme = await import('/static/theme.js');
            return [names.map((n) => theme.stageColour(n)), theme.depth(12)];
        }""",
        names,
    )
    assert found[0] == [stage_colour(name) for name in names]
    depth = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in found[1]])
    expected = 255 * np.asarray(Depth(range(12)).colours)[:, :3]
    assert np.abs(depth - expected).max() < 6


def test_numbers_are_written_for_people(page, site):
    go(page, site, "text")
    found = page.evaluate(
        """async () => {
            const {bytes, chosen, number, ranges, seconds} = await import('/static/format.js');
            return [
                [999, 1000, 250e6, 281018368, 1.536e12].map(bytes),
                [0.004, 0.0899, 9, 42.4, 600, 14400].map(seconds),
                [0, 12, -0.5, 1e-4, 123456.7, 1.2e9, null].map((x) => number(x)),
                [ranges([0, 1, 2, 5, 7, 8]), ranges([3])],
                [chosen('0,3-5', [0, 1, 2, 3, 4, 5]), chosen('-1', [0, 1, 2]), chosen('9', [0])],
            ];
        }"""
    )
    assert found[0] == ["999 B", "1 kB", "250 MB", "281 MB", "1.54 TB"]
    assert found[1] == ["4 ms", "90 ms", "9 s", "42 s", "10 min", "4 h"]
    assert found[2] == ["0", "12", "−0.5", "1e−4", "123500", "1.2e9", "–"]
    assert found[3] == ["0-2,5,7,8", "3"]
    assert found[4] == [[0, 3, 4, 5], [2], None]


# -- the same numbers as the library ---------------------------------------------------------------


def assert_line(line: dict[str, Any], x: Any, y: Any) -> None:
    there = np.isfinite(np.asarray(y, float))
    np.testing.assert_allclose(line["x"], np.asarray(x)[there])
    np.testing.assert_allclose(line["y"], np.asarray(y, float)[there], rtol=1e-6)


def test_overview_is_the_librarys(page, site, demo):
    go(page, site, tokens="position > 0")
    inside = {"tokens": "position > 0"}
    moments = actstore.compute(actstore.moments(demo, per="layer", **inside))
    for line in drawn(page, "moments"):
        values = moments[line["meta"]["variable"]].sel(stage=line["meta"]["stage"])
        assert_line(line, moments["layer"].values, values.values)
    dims = actstore.compute(actstore.dimensionality(demo, **inside))
    lines = [line for line in drawn(page, "overview-dimensions") if line["meta"]]
    assert len(lines) == 2 * len(STAGES)
    for line in lines:
        values = dims[line["meta"]["variable"]].sel(stage=line["meta"]["stage"])
        assert_line(line, dims["layer"].values, values.values)
    rsa = actstore.compute(actstore.rsa(demo, **inside))
    for line in drawn(page, "overview-rsa"):
        assert_line(line, rsa["layer"].values, rsa["rsa"].sel(pair=line["meta"]["pair"]).values)
    used = page.locator("#panel-moments [data-tokens]").get_attribute("data-tokens")
    assert int(used) == moments.attrs["tokens_used"]
    assert page.locator("#tokens-count").inner_text() == f"{int(used):,} of 1,500 tokens"


def test_distributions_are_the_librarys(page, site, demo):
    go(
        page,
        site,
        "distributions",
        stage="mlp_out",
        layer=2,
        neuron=5,
        counts=1,
        range="-2,2",
        bins=50,
    )
    own = actstore.histogram(
        demo, stages="mlp_out", bins=50, range=(-2, 2), approximate=True
    ).compute()
    lines = [line for line in drawn(page, "hist-layers") if line["name"]]
    for i, line in enumerate(lines):
        np.testing.assert_allclose(line["y"][::2], own["counts"][i])
    one = actstore.histogram(demo, stages="mlp_out", layers=2, neurons=5, per="neuron", bins=50)
    (line,) = drawn(page, "hist-neuron")
    result = one.compute()
    np.testing.assert_allclose(line["y"][::2], result["counts"].values.ravel())
    np.testing.assert_allclose(line["x"][::2], result["edges"].values.ravel()[:-1])


def test_zooming_asks_for_finer_bins(page, site):
    go(page, site, "distributions", stage="mlp_out")
    plot = page.locator("#panel-hist-layers .plot").bounding_box()
    assert plot
    middle = plot["y"] + 120
    page.mouse.move(plot["x"] + 150, middle)
    page.mouse.down()
    page.mouse.move(plot["x"] + 250, middle, steps=4)
    page.mouse.up()
    page.wait_for_function("location.hash.includes('range')")
    settle(page)
    low, high = map(float, state_of(page)["range"].split(","))
    assert page.locator("#ctl-range").input_value() == state_of(page)["range"]
    line = drawn(page, "hist-layers")[0]
    assert line["x"][0] == pytest.approx(low, rel=0.05, abs=0.02)
    assert line["x"][-1] == pytest.approx(high, rel=0.05, abs=0.02)
    page.check("#ctl-log")
    settle(page)
    kind = page.eval_on_selector("#panel-hist-layers .plot", "p => p.layout.yaxis.type")
    assert kind == "log"


def test_neurons_are_the_librarys(page, site, demo):
    go(page, site, "neurons", stage="mlp_post", layer=3, sort="-kurtosis")
    moments = actstore.compute(actstore.moments(demo, stages="mlp_post", layers=3)).isel(layer=0)
    order = np.argsort(-moments["kurtosis"].values, kind="stable")
    rows = page.locator("#neurons tbody tr")
    assert rows.count() == 25
    shown = [int(row.get_attribute("data-neuron")) for row in rows.all()]
    assert shown == order[:25].tolist()
    for name in ("mean", "max", "zero_fraction"):
        cells = page.locator(f"#neurons td[data-column={name}]").all()
        found = [float(cell.get_attribute("data-value")) for cell in cells]
        np.testing.assert_allclose(found, moments[name].values[order[:25]])
    # Nobody had picked a neuron: it is the table's first. Another one by a click.
    assert state_of(page)["neuron"] == str(shown[0])
    page.locator(f"#neurons tr[data-neuron='{shown[3]}'] button").click()
    settle(page)
    assert state_of(page)["neuron"] == str(shown[3])
    top = actstore.compute(
        actstore.top_tokens(demo, stages="mlp_post", layers=3, neurons=shown[3], k=12)
    )
    items = page.locator("#panel-neuron-top li")
    tokens = [int(item.get_attribute("data-token")) for item in items.all()]
    assert tokens == top["token"].values.ravel().tolist()
    expect(page.locator("#panel-neuron-top[data-texts=done]")).to_be_visible()
    marked = items.first.locator(".token.marked").inner_text()
    word = str(top["token_text"].values.ravel()[0])
    assert marked.strip() == word.replace("\n", "⏎").strip()
    assert items.first.locator(".token").count() > 5
    # From a token to its text.
    items.nth(2).locator("a").click()
    settle(page)
    at = state_of(page)
    assert at["tab"] == "text"
    assert int(at["pos"]) == int(top["position"].values.ravel()[2])
    expect(page.locator("#text-tokens [aria-selected=true]")).to_have_count(1)


def test_neurons_go_on(page, site):
    go(page, site, "neurons", stage="mlp_out", layer=1, sort="neuron")
    first = page.locator("#neurons tbody tr").first
    assert first.get_attribute("data-neuron") == "0"
    page.locator("#neuron-pager [data-action=after]").click()
    expect(first).to_have_attribute("data-neuron", "25")
    page.locator("[data-sort=mean]").click()
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("mean")
    page.locator("[data-sort=mean]").click()
    expect(page.locator("th[aria-sort=ascending]")).to_contain_text("mean")
    page.check("#ctl-shape")
    settle(page)
    assert page.locator("#neurons [data-sort=score]").is_visible()


def test_similarity_is_the_librarys_and_opens_its_matrices(page, site, demo):
    go(page, site, "similarity")
    rsa = actstore.compute(actstore.rsa(demo))
    (heat,) = drawn(page, "rsa")
    np.testing.assert_allclose(heat["z"], rsa["rsa"].values.T, rtol=1e-5)
    click_cell(page, "rsa", row=2, column=1)
    page.wait_for_function("location.hash.includes('pair')")
    settle(page)
    assert state_of(page)["pair"] == "mlp_post:mlp_out"
    assert state_of(page)["layer"] == "1"
    assert page.locator("#panel-matrix-a h3").inner_text() == "Tokens at mlp_post, layer 1"
    texts = page.evaluate("location.href")
    assert texts
    page.locator("#panel-matrix-b [data-action=cli]").click()
    line = page.locator("#panel-matrix-b .code pre").inner_text()
    asked = shlex.split(line)
    tokens = asked[asked.index("--tokens") + 1]
    own = actstore.cosine_matrix(demo, stages="mlp_out", layers=1, tokens=tokens).compute()
    assert own.sizes["token"] == 64
    matrix = own["similarity"].values[0].copy()
    found = np.array(drawn(page, "matrix-b")[0]["z"], float)
    np.fill_diagonal(matrix, np.nan)
    np.testing.assert_allclose(found, matrix, atol=1e-5)
    page.select_option("#ctl-measure", "cka")
    settle(page)
    cka = actstore.compute(actstore.cka(demo))
    np.testing.assert_allclose(drawn(page, "rsa")[0]["z"], cka["cka"].values.T, rtol=1e-4)


def test_the_slider_shows_pairs_at_once(page, site, demo):
    """Moving it asks nobody: the pairs at all its places came with the density."""
    go(page, site, "similarity", stage="mlp_post", layer=3)
    result = actstore.cosine_pairs(demo, stages="mlp_post", layers=3, quantiles=[0, 0.25, 0.99])
    expected = actstore.compute(result).isel(layer=0)
    density = drawn(page, "cosines")[0]
    np.testing.assert_allclose(density["y"][::2], expected["density"].values, rtol=1e-6)
    before = len(page.watch.requests)
    slider = page.locator("#quantile")
    places = page.evaluate("async () => (await import('/static/cosines.js')).QUANTILES")
    for i, q in enumerate((0, 0.25, 0.99)):
        took = slider.evaluate(
            """(slider, at) => {
                const start = performance.now();
                slider.value = String(at);
                slider.dispatchEvent(new Event('input', {bubbles: true}));
                return performance.now() - start;
            }""",
            places.index(q),
        )
        assert took < 100
        shown = float(page.locator("#cosine-value").get_attribute("data-value"))
        assert shown == pytest.approx(float(expected["cosine"][i]), rel=1e-6)
        contexts = page.locator("#cosine-pair .context p")
        for at, side in enumerate("ab"):
            text = str(expected[f"context_{side}"].values[i]).replace("\n", "⏎")
            assert contexts.nth(at).text_content().startswith(text)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert float(page.locator("#cosine-value").get_attribute("data-value")) < shown
    page.wait_for_timeout(400)
    assert float(state_of(page)["q"]) < 0.99
    page.locator("#match").click()
    assert "normal data of" in drawn(page, "cosines")[1]["name"]
    matching = float(
        actstore.compute(
            actstore.gaussian_baseline(demo, stages="mlp_post", layers=3, n=1000, dimensions=4)
        )["matching_dimension"][0]
    )
    assert drawn(page, "cosines")[1]["name"] == f"normal data of {round(matching)} dimensions"
    page.locator("#dimension").evaluate(
        "s => { s.value = '3'; s.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    assert drawn(page, "cosines")[1]["name"] == "normal data of 5 dimensions"
    asked = page.watch.requests[before:]
    assert [url for url in asked if "/api/" in url] == []


def test_information_and_layers_are_the_librarys(page, site, demo):
    go(page, site, "information", stage="hidden", layer=3, drawn=32)
    page.locator("#panel-mutual-information [data-action=cli]").click()
    asked = shlex.split(page.locator("#panel-mutual-information .code pre").inner_text())
    tokens = asked[asked.index("--tokens") + 1]
    own = actstore.mutual_information(demo, stages="hidden", layers=3, tokens=tokens).compute()
    for panel, name in (
        ("mutual-information", "mutual_information"),
        ("pair-covariance", "covariance"),
    ):
        np.testing.assert_allclose(
            np.array(drawn(page, panel)[0]["z"], float), own[name].values[0], atol=1e-6
        )
    told = actstore.label_information(demo, stages="hidden", label="name", k=100).compute()
    page.select_option("#ctl-label", "name")
    settle(page)
    for i, line in enumerate(drawn(page, "label-information")[:-1]):
        np.testing.assert_allclose(line["y"], told["information"].values[i], rtol=1e-6)
    go(page, site, "layers", stage="mlp_out")
    layers = actstore.layer_covariance(demo, stages="mlp_out").compute()
    found = np.array(drawn(page, "layer-r2")[0]["z"], float)
    np.testing.assert_allclose(found, 100 * layers["r_squared"].values, rtol=1e-5)
    click_cell(page, "layer-covariance", row=2, column=4)
    page.wait_for_function("location.hash.includes('lb=4')")
    settle(page)
    assert page.locator("#panel-layer-scatter h3").inner_text() == "mlp_out: h.2 against h.4"


def test_text_has_values_and_predictions(page, site, demo):
    go(page, site, "text", sequence=1, stage="mlp_post", layer=4, neuron=7)
    words = page.locator("#text-tokens [data-position]")
    start, length = (int(demo.sequences[n][1]) for n in ("start", "length"))
    assert words.count() == min(length, 300)
    kept = np.asarray(demo.column("input"))
    token = int(np.searchsorted(kept, start + 9))
    value = float(words.nth(9).get_attribute("data-value"))
    assert value == pytest.approx(float(demo["mlp_post"].sel(layer=4, neuron=7)[token]), rel=1e-6)
    words.nth(9).click()
    page.wait_for_selector("#predictions tr")
    rows = page.locator("#predictions tr")
    assert rows.count() == 8
    chances = demo.predictions.isel(token=token)
    probability = next(v for v in chances.data_vars.values() if v.dtype.kind == "f")
    shown = float(rows.first.locator(".value").inner_text())
    assert shown == pytest.approx(float(probability[0]), abs=6e-4)
    loss = float(demo.outcomes["loss"][token])
    assert f"{loss:.4g} nats" in page.locator("#token-detail").inner_text()
    page.select_option("#ctl-colour", "loss")
    settle(page)
    found = float(words.nth(9).get_attribute("data-value"))
    assert found == pytest.approx(loss, rel=1e-5)
    page.fill("#token-search", "the")
    page.locator("#token-hits button").first.click()
    settle(page)
    assert "the" in page.locator("#text-tokens [aria-selected=true]").inner_text().lower()


# -- pickers, addresses, files ---------------------------------------------------------------------


def test_pickers_change_what_is_asked(page, site):
    go(page, site, "distributions", layer=3)
    assert len(drawn(page, "hist-stages")) == len(STAGES)
    page.uncheck("#stage-hidden")
    settle(page)
    assert "hidden" not in state_of(page)["stages"].split(",")
    assert {line["name"] for line in drawn(page, "hist-stages")} == set(STAGES[1:])
    page.fill("#ctl-layers", "1,3-5")
    page.keyboard.press("Tab")
    settle(page)
    names = [line["name"] for line in drawn(page, "hist-layers") if line["name"]]
    assert names == [f"layer {n} (h.{n})" for n in (1, 3, 4, 5)]
    page.locator("#layer-strip [data-layer='3']").click()
    settle(page)
    assert state_of(page)["layers"] == "1,4,5"
    assert page.locator("#ctl-layer").first.input_value() == "4"  # the nearest that is left
    page.fill("#ctl-layers", "9")
    page.keyboard.press("Tab")
    assert "There are layers 0-6" in page.locator("#layers-error").inner_text()
    assert state_of(page)["layers"] == "1,4,5"


def test_a_wrong_filter_is_explained_where_it_is(page, site):
    page.watch.expected.append("400 (Bad Request)")
    go(page, site, "text")
    page.fill("#ctl-tokens", "positon > 0")
    page.keyboard.press("Enter")
    error = page.locator("#tokens-error")
    expect(error).to_contain_text("unknown column 'positon'")
    expect(page.locator("#ctl-tokens")).to_have_attribute("aria-invalid", "true")
    assert "tokens" not in state_of(page)
    page.locator("#tokens-nearest").click()
    expect(page.locator("#tokens-count")).to_contain_text("of 1,500 tokens")
    assert state_of(page)["tokens"] == "position > 0"
    expect(error).to_have_text("")
    page.fill("#ctl-tokens", "position >")
    page.keyboard.press("Enter")
    expect(error).to_contain_text("missing here")
    page.fill("#ctl-tokens", "position > 100000")
    page.keyboard.press("Enter")
    expect(error).to_contain_text("No token")


def test_the_address_is_the_state(page, site):
    """Whoever opens it sees the same; the back button goes back."""
    state = {"stages": "mlp_in,mlp_out", "layers": "1-3", "tokens": "position > 2"}
    go(page, site, "distributions", stage="mlp_out", layer=2, neuron=11, log=1, **state)
    assert page.locator("#ctl-stage").input_value() == "mlp_out"
    assert page.locator("#ctl-neuron").input_value() == "11"
    assert page.locator("#ctl-tokens").input_value() == "position > 2"
    assert page.locator("#ctl-log").is_checked()
    assert page.locator("#stages input:checked").count() == 2
    page.select_option("#ctl-layer", "3")
    settle(page)
    page.locator("#tab-layers").click()
    settle(page)
    page.go_back()
    settle(page)
    expect(page.locator("#tabpanel-distributions")).to_be_visible()
    assert page.locator("#ctl-layer").first.input_value() == "3"
    page.go_back()
    settle(page)
    assert page.locator("#ctl-layer").first.input_value() == "2"
    title = page.locator("#panel-hist-neuron h3").inner_text()
    page.reload()
    settle(page)
    assert page.locator("#panel-hist-neuron h3").inner_text() == title


def test_what_is_shown_can_be_taken_along(page, site, demo, stores, monkeypatch, tmp_path):
    monkeypatch.chdir(stores)
    go(page, site, "layers", stage="mlp_out", tokens="position > 0", layers="1-3")
    panel = page.locator("#panel-layer-covariance")
    panel.locator("[data-action=python]").click()
    code = panel.locator(".code pre").inner_text()
    expect(panel.locator(".code")).to_contain_text("Copied as Python")
    assert page.evaluate("navigator.clipboard.readText()") == code
    names: dict[str, Any] = {}
    exec(code, names)
    expected = names["result"]
    assert expected.attrs["tokens"] == "position > 0"
    panel.locator("[data-action=cli]").click()
    line = panel.locator(".code pre").inner_text()
    command = [sys.executable, "-m", "actstore_cli", *shlex.split(line)[1:], "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def taken(action: str) -> bytes:
        with page.expect_download() as download:
            panel.locator(f"[data-action={action}]").click()
        return Path(download.value.path()).read_bytes()

    found = json.loads(taken("json"))
    for other in (json.loads(printed), to_json(expected)):
        for name, variable in other["variables"].items():
            np.testing.assert_allclose(
                np.array(found["variables"][name]["data"], float),
                np.array(variable["data"], float),
                rtol=1e-5,
            )
    assert taken("csv").decode().splitlines()[0] == to_csv(expected).splitlines()[0]
    assert taken("png").startswith(b"\x89PNG")


# -- long questions --------------------------------------------------------------------------------


def all_tokens(url: str) -> str:
    """The same question about every token: pairs of them take a while."""
    head, _, query = url.partition("?")
    kept = [(k, v) for k, v in parse_qsl(query) if k not in ("tokens", "layers")]
    return f"{head}?{urlencode([*kept, ('null', '0')])}"


def test_a_long_question_can_be_cancelled(page, site):
    page.route(
        re.compile(r"/mutual_information\?.*reduce=histogram"),
        lambda route: route.continue_(url=all_tokens(route.request.url)),
    )
    page.goto(f"{site}/#{urlencode({'store': 'demo', 'tab': 'information', 'stage': 'mlp_post'})}")
    panel = page.locator("#panel-information-sweep")
    expect(panel).to_have_attribute("data-state", "job")
    expect(panel.locator("progress")).to_be_visible()
    expect(panel.locator(".job-text")).to_contain_text("%")
    expect(panel).to_have_attribute("aria-busy", "true")
    panel.locator("[data-action=cancel]").click()
    expect(panel).to_have_attribute("data-state", "cancelled")
    jobs = page.request.get(f"{site}/api/jobs").json()["jobs"]
    mine = [job for job in jobs if job["query"] == "mutual_information"]
    assert mine and mine[-1]["state"] == "cancelled"
    # What is no longer looked at is cancelled as well.
    panel.locator("[data-action=compute]").click()
    expect(panel).to_have_attribute("data-state", "job")
    page.locator("#tab-text").click()
    for _ in range(100):
        jobs = page.request.get(f"{site}/api/jobs").json()["jobs"]
        if all(job["state"] not in ("queued", "running") for job in jobs):
            break
        page.wait_for_timeout(100)
    assert [j["state"] for j in jobs if j["query"] == "mutual_information"].count("cancelled") >= 2


def test_a_huge_store_is_not_loaded(page, site):
    """48 layers of 6,400 neurons and a million tokens: what takes long is offered, not begun.

    The store has no values, so that what would read little (one neuron) says that it misses them.
    """
    page.watch.expected.append("500 (Internal Server Error)")
    page.goto(f"{site}/#store=huge")
    page.wait_for_selector("body[data-ready=true]")
    for tab in ("overview", "distributions", "neurons", "dimensionality", "layers"):
        page.locator(f"#tab-{tab}").click()
        settle(page, compute=False)
        for panel in page.locator(f"#tabpanel-{tab} [data-panel]:visible").all():
            state = panel.get_attribute("data-state")
            if state == "done":  # it was known
                assert panel.locator(".badge").inner_text() == "sketch"
            elif state == "error":
                assert "is missing" in panel.locator(".notice").inner_text()
            else:
                assert state in ("waiting", "empty", "idle")
    assert page.watch.received < 3_000_000
    offer = page.locator("#panel-layer-covariance .notice")
    assert re.search(r"reads [\d.]+ [GT]B, which takes about [\d.]+ (min|h)", offer.inner_text())
    assert page.locator("#layer-strip button").count() == 48
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


# -- for everyone ----------------------------------------------------------------------------------


def test_dark_and_light(browser, site):
    context = browser.new_context(color_scheme="dark", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    watch = Watch(page, site)
    go(page, site)
    look = """() => [
        getComputedStyle(document.body).backgroundColor,
        document.querySelector('#panel-moments .plot').layout.template.layout.font.color,
    ]"""
    dark = page.evaluate(look)
    assert page.get_attribute("html", "data-theme") == "dark"
    line = "() => document.querySelector('#panel-moments .plot').data[0].line.color"
    page.locator("#theme").click()
    assert page.get_attribute("html", "data-theme") == "light"
    light = page.evaluate(look)
    assert dark[0] != light[0] and dark[1] != light[1]
    assert page.evaluate(line) == stage_colour("hidden")
    page.reload()
    settle(page)
    assert page.get_attribute("html", "data-theme") == "light"  # it is remembered
    assert not watch.problems
    context.close()


def test_the_keyboard_is_enough(page, site):
    go(page, site, "layers")
    page.locator("#tab-layers").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-text")).to_be_focused()
    expect(page.locator("#tabpanel-text")).to_be_visible()
    page.keyboard.press("Home")
    expect(page.locator("#tab-overview")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("End")
    settle(page)
    words = page.locator("#text-tokens [data-position]")
    words.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(words.nth(2)).to_be_focused()
    page.keyboard.press("Enter")
    expect(words.nth(2)).to_have_attribute("aria-selected", "true")
    assert state_of(page)["pos"] == words.nth(2).get_attribute("data-position")
    # Every input has a label, every button a name, every figure a description.
    bare = page.evaluate(
        """() => [...document.querySelectorAll('input, select, button')]
            .filter((n) => n.offsetParent && !n.labels?.length)
            .filter((n) => !n.getAttribute('aria-label') && !n.textContent.trim())
            .map((n) => n.outerHTML)"""
    )
    assert bare == []
    go(page, site)
    figures = page.locator(".plot:visible")
    assert all(
        f.get_attribute("role") == "img" and f.get_attribute("aria-label") for f in figures.all()
    )


def test_markup_in_a_store_is_text(page, site):
    """Tokens, labels and names come from elsewhere: none of it is ever taken for markup."""
    for tab in TABS:
        page.goto("about:blank")
        page.goto(f"{site}/#store=hostile&tab={tab}&by={quote('kind')}&pos=0")
        page.wait_for_selector("body[data-ready=true]")
        settle(page)
    page.locator("#token-search").fill("<")
    page.wait_for_selector("#token-hits li")
    assert page.locator("#text-tokens").inner_text().startswith("</script><img src=x")
    assert "</script><img" in page.locator("[data-card=model]").inner_text()
    assert page.evaluate("document.body.dataset.hacked") is None
    assert page.locator("main img").count() == 0
