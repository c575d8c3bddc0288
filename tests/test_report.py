"""The report: one file, opened without a network."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import HOSTILE, Watch, chromium, write_hostile
from helpers import write_small
from playwright.sync_api import Browser, Page

import actstore
from actstore.demo.corpus import demo_records
from actstore.errors import UsageError
from actstore.report import report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    model, tokenizer = actstore.load_model("demo", device="cpu")
    stages = ["hidden", "mlp_in", "mlp_post", "mlp_out"]
    store = actstore.dump(
        model,
        tokenizer,
        demo_records(),
        made / "demo.zarr",
        stages=stages,
        max_tokens=1500,
        name="demo",
    )
    report(store, made / "demo.html")
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Without a network; what it complains of fails the test."""
    context = browser.new_context(
        offline=True, viewport={"width": 1280, "height": 900}, color_scheme="light"
    )
    made = context.new_page()
    watch = Watch(made, "file:")
    yield made
    context.close()
    assert not watch.problems


def show(page: Page, path: Path) -> None:
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=true]")
    page.wait_for_timeout(150)


def embedded(path: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="report">(.*?)</script>', path.read_text()
    )
    assert found
    return json.loads(found[1])


def test_every_figure_is_drawn(page, root):
    show(page, root / "demo.html")
    panels = page.locator("[data-panel]")
    names = [panel.get_attribute("data-panel") for panel in panels.all()]
    assert {"moments", "stages", "depth", "neurons", "largest", "passage", "rsa", "cosines"} < set(
        names
    )
    assert {"dimensionality", "spectrum", "intrinsic", "mutual_information", "sweep"} < set(names)
    assert {"layers-covariance", "layers-r_squared"} < set(names)
    assert page.locator(".panel .notice").count() == 0
    figures = [
        p for s in embedded(root / "demo.html")["sections"] for p in s["panels"] if p["figure"]
    ]
    assert page.locator(".js-plotly-plot .main-svg").count() >= len(figures)
    assert page.locator("#card dd").count() == 7
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_numbers_are_the_librarys(page, root):
    store = actstore.open(root / "demo.zarr")
    show(page, root / "demo.html")
    moments = actstore.compute(actstore.moments(store, per="layer"))
    lines = page.eval_on_selector(
        "#panel-moments .plot", "plot => plot.data.map(({meta, y}) => ({meta, y}))"
    )
    for line in lines:
        values = moments[line["meta"]["variable"]].sel(stage=line["meta"]["stage"]).values
        np.testing.assert_allclose(line["y"], values[np.isfinite(values)], rtol=1e-6)
    rsa = actstore.compute(actstore.rsa(store))
    z = page.eval_on_selector("#panel-rsa .plot", "plot => plot.data[0].z")
    np.testing.assert_allclose(z, rsa["rsa"].values.T, rtol=1e-5)
    content = embedded(root / "demo.html")
    spread = actstore.compute(actstore.moments(store, stages="mlp_post", layers=3))["std"]
    assert f"neuron {int(spread.values.argmax())}" in content["sections"][2]["title"]


def test_every_figure_says_how_it_was_made(page, root, monkeypatch):
    monkeypatch.chdir(root)
    show(page, root / "demo.html")
    panel = page.locator("#panel-layers-r_squared")
    panel.locator("summary").click()
    code, line = panel.locator("pre").all_inner_texts()
    names: dict[str, Any] = {}
    exec(code, names)
    z = page.eval_on_selector("#panel-layers-r_squared .plot", "plot => plot.data[0].z")
    expected = 100 * names["result"]["r_squared"].values
    np.testing.assert_allclose(z, expected, rtol=1e-5)
    command = [sys.executable, "-m", "actstore_cli", *shlex.split(line)[1:], "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    np.testing.assert_allclose(
        100 * np.array(json.loads(printed)["variables"]["r_squared"]["data"]), expected, rtol=1e-5
    )


def test_the_slider_and_the_colours_work(page, root):
    show(page, root / "demo.html")
    value = page.locator("#cosine-value")
    before = value.inner_text()
    page.locator("#quantile").evaluate(
        "s => { s.value = s.max; s.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    assert value.inner_text() != before
    assert page.locator("#cosine-pair .context p").first.inner_text()
    page.locator("#theme").click()
    assert page.get_attribute("html", "data-theme") == "dark"


def test_markup_in_a_store_is_text(page, root, tmp_path):
    write_hostile(tmp_path / "hostile.zarr")
    path = report(tmp_path / "hostile.zarr", tmp_path / "hostile.html", title=HOSTILE)
    text = path.read_text()
    assert HOSTILE not in text
    assert text.count("</script>") == 3
    show(page, path)
    assert page.evaluate("document.body.dataset.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text() == HOSTILE
    assert HOSTILE in page.locator("#panel-passage .text").inner_text()


def test_stores_of_other_shapes(page, tmp_path):
    """Heads, half precision, a special token, gaps; one stage, one layer, few tokens."""
    write_small(tmp_path / "small.zarr")
    path = report(tmp_path / "small.zarr", tmp_path / "small.html", tokens="not special")
    show(page, path)
    assert page.locator("[data-panel]").count() > 12
    path = report(tmp_path / "small.zarr", tmp_path / "one.html", stages="mlp_out", layers="1")
    show(page, path)
    assert page.locator("#panel-rsa").count() == 0


def test_the_file_is_whole_and_the_same_again(root, tmp_path):
    again = report(root / "demo.zarr", tmp_path / "demo.html")
    assert again.read_bytes() == (root / "demo.html").read_bytes()
    assert list(tmp_path.iterdir()) == [again]
    assert b"https://" not in again.read_bytes().split(b'<script type="application/json"')[0]
    with pytest.raises(UsageError, match=r"\.html"):
        report(root / "demo.zarr", tmp_path / "demo.pdf")
    with pytest.raises(UsageError, match="no folder"):
        report(root / "demo.zarr", tmp_path / "none" / "demo.html")
    with pytest.raises(UsageError, match="unknown stage"):
        report(root / "demo.zarr", tmp_path / "demo.html", stages="mlp")
    with pytest.raises(UsageError, match="neuron 9999"):
        report(root / "demo.zarr", tmp_path / "demo.html", neuron=9999)


def test_the_command(root, tmp_path):
    command = [sys.executable, "-m", "actstore_cli", "report", str(root / "demo.zarr")]
    out = tmp_path / "own.html"
    options = ["--stages", "hidden,mlp_out", "--tokens", "position > 0", "--title", "My own"]
    done = subprocess.run(
        [*command, "--out", str(out), *options], capture_output=True, text=True, check=True
    )
    assert f"written to {out}" in done.stderr.replace("\n", "")
    content = embedded(out)
    assert content["title"] == "My own"
    assert content["results"][0]["attrs"]["tokens"] == "position > 0"
    assert "--tokens 'position > 0'" in content["command"]
    wrong = subprocess.run([*command, "--out", "x.pdf"], capture_output=True, text=True)
    assert wrong.returncode == 2
