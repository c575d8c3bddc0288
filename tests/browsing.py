"""Chromium for tests, and hostile stores for it to show."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import STAGES, plan_of, random_values, write_store
from playwright.sync_api import Browser, Error, Page, sync_playwright

from actstore.corpus import build, label_column

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

HOSTILE = "</script><img src=x onerror=\"document.body.dataset.hacked='yes'\">"
"""Text that would run where it is taken for markup."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser: the system's, else Playwright's own.

    To be left again: its event loop is in the way of those of other tests.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        except Error as error:
            pytest.fail(
                "these tests need Chromium: `apt-get install chromium`, or `playwright install "
                f"chromium`, or set CHROMIUM to its path ({error.message.splitlines()[0]})"
            )
        with browser:
            yield browser


class Watch:
    """What a page complains of, and whom it asks.

    Attributes
    ----------
    problems : list of str
        Errors and warnings of its console, exceptions, and requests to others than `origin`.
    requests : list of str
        Addresses asked, without those of the page itself.
    received : int
        Bytes of answers from /api.
    """

    def __init__(self, page: Page, origin: str) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.received = 0
        self.expected: list[str] = []
        page.on("console", lambda m: m.type in ("error", "warning") and self._note(m.text))
        page.on("pageerror", lambda e: self._note(f"exception: {e}"))
        page.on("request", lambda r: self._asked(r.url, origin))
        page.on("response", self._answered)

    def _note(self, text: str) -> None:
        if not any(part in text for part in self.expected):
            self.problems.append(text)

    def _asked(self, url: str, origin: str) -> None:
        if url.startswith(("data:", "blob:")):
            return
        if not url.startswith(origin):
            self.problems.append(f"asked another host: {url}")
        self.requests.append(url)

    def _answered(self, response: Any) -> None:
        if "/api/" in response.url:
            self.received += int(response.headers.get("content-length", 0))


def write_hostile(path: Path) -> None:
    """A small store whose tokens, labels and model's name are markup."""
    rng = np.random.default_rng(3)
    words = np.array([HOSTILE, *(f"<b>{i}</b>&amp;\n" for i in range(11))], dtype=object)
    corpus = build([[0, *rng.integers(0, 12, 11).tolist()] for _ in range(12)])
    corpus = replace(
        corpus,
        sequence_labels={
            **corpus.sequence_labels,
            "kind": label_column([HOSTILE if i % 2 else "plain" for i in range(12)]),
        },
    )
    plan = plan_of(corpus, STAGES, 64, provenance={"model": {"name": HOSTILE}})
    assert write_store(path, plan, random_values(plan), vocabulary=words).sealed
