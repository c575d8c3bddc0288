"""The documents: every block of code in README and guide runs, and the reference is not stale.

The blocks of a document run in its order, in a folder where `book.txt` is a text and `gpt2` the
demo model: Python in one namespace, `actstore ...` in this process, other commands by bash. Where
a block fails, the traceback names the document and the line.
"""

from __future__ import annotations

import inspect
import linecache
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import actstore_cli
import boto3
import make_reference as reference
import pytest
import torch
from helpers import prose
from hub_server import TOKEN, hub_server
from markdown_it import MarkdownIt
from moto.server import ThreadedMotoServer
from s3_faults import free_port, wait_for_port
from typer.main import get_command

import actstore
from actstore import errors, plot
from actstore.demo import MODEL_DIR
from actstore.queries.registry import QUERIES
from actstore.remote import object_store

ROOT = Path(__file__).parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "notebooks" / "guide.md"

LEFT_OUT = {
    r"pip install [^&\n]*(&& )?": "the tests run where it has been run; .ci/run does it anew",
    r"^pytest$": "would run itself",
}
"""Commands that no test runs, and why not."""

LONG = ("actstore demo", "actstore serve", "actstore report")
"""Commands that only the slow run runs."""

OUTSIDE = ("push", "pull")
"""Commands of actstore with a process of their own: what they import looks at its environment."""

PORT = "8137"
"""Of a server that a document starts; here a free one is taken instead."""

CHARACTERS = 6_000


@dataclass(frozen=True)
class Block:
    """A block of code and where it is."""

    path: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


def blocks(path: Path) -> list[Block]:
    found = []
    for token in MarkdownIt().parse(path.read_text()):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            first = token.map[0] + (token.type == "fence") + 1
            found.append(Block(path, first, token.info.strip(), token.content))
    return found


class Reader:
    """Somebody who types in what a document shows, in its order.

    Attributes
    ----------
    long : bool
        Whether they have time for what `LONG` names.
    """

    def __init__(self, long: bool = True) -> None:
        self.long = long
        self._names: dict[str, Any] = {"__name__": "reader"}
        # A dask Client changes this process's own; its threads are part of what a dump is.
        threads = dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads())
        )
        self._environment = {**os.environ, **threads}
        self._port = str(free_port())
        self._servers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.terminate()
            server.wait()

    def follow(self, path: Path) -> None:
        for block in blocks(path):
            self.do(block)

    def do(self, block: Block) -> None:
        if block.language == "python":
            self._python(block)
        elif block.language == "bash":
            for command in commands(block):
                if self.long or not command.startswith(LONG):
                    self._command(command.replace(PORT, self._port))
        else:
            raise AssertionError(f"{block}: no language; fence it as python or bash")

    def _python(self, block: Block) -> None:
        text, name = "\n" * (block.line - 1) + block.code, str(block.path)
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), self._names)

    def _command(self, command: str) -> None:
        words = shlex.split(command)
        if words[:2] == ["actstore", "serve"] and "--get" not in words:
            self._look(words)
        elif words[-1] == "&":
            self._start(words[:-1])
            wait_for_port(int(self._port))
        elif words[0] == "actstore" and words[1] not in OUTSIDE and not is_for_bash(command):
            assert not actstore_cli.app(words[1:], standalone_mode=False), command
        else:
            subprocess.run(["bash", "-euc", command], env=self._environment, check=True)

    def _start(self, words: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE if "serve" in words else subprocess.DEVNULL
        server = subprocess.Popen(words, env=self._environment, stderr=pipe, text=True)
        self._servers.append(server)
        return server

    def _look(self, words: list[str]) -> None:
        """Start the service, get its page, stop it as Ctrl-C does."""
        server = self._start([*words, "--port", "0"])
        assert server.stderr is not None
        said = server.stderr.readline() + server.stderr.readline()
        address = re.search(r"http://\S+", said)
        assert address, said
        with urllib.request.urlopen(address[0], timeout=60) as answer:
            assert answer.status == 200 and b"<html" in answer.read()
        server.send_signal(signal.SIGINT)
        assert server.wait() == 0, said


def commands(block: Block) -> list[str]:
    """A block's commands, without those that are left out; a line may go on after a backslash."""
    code = block.code.replace("\\\n", " ")
    for pattern in LEFT_OUT:
        code = re.sub(pattern, "", code, flags=re.MULTILINE)
    return [line.strip() for line in code.split("\n") if line.strip()]


def is_for_bash(command: str) -> bool:
    """Whether it has pipes, redirections, or several commands."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return any(set(word) <= set("();<>|&") for word in lexer)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a document is followed."""
    (tmp_path / "gpt2").symlink_to(MODEL_DIR)
    (tmp_path / "book.txt").write_text(prose(CHARACTERS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("BROWSER", "true")  # of `serve --open`
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 server with the bucket `runs`, where the environment says."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="runs")
    yield
    server.stop()
    object_store.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for the Hugging Face Hub."""
    with hub_server() as (_, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("place")
def test_readme(long: bool) -> None:
    with Reader(long) as reader:
        reader.follow(README)


@pytest.mark.slow
@pytest.mark.usefixtures("place", "bucket", "hub")
def test_guide() -> None:
    with Reader() as reader:
        reader.follow(GUIDE)


def test_guide_is_well_formed() -> None:
    """What takes no time to find out: Python that compiles, options that there are."""
    for block in blocks(GUIDE):
        if block.language == "python":
            compile(block.code, str(block), "exec")
            continue
        for command in commands(block):
            words = shlex.split(command)
            if words[0] == "actstore" and not is_for_bash(command):
                actstore_cli.app([*words[1:], "--help"], standalone_mode=False)


def test_what_is_left_out_is_there() -> None:
    every = "\n".join(b.code for path in (README, GUIDE) for b in blocks(path))
    assert [p for p in LEFT_OUT if not re.search(p, every, re.MULTILINE)] == []


def test_links_lead_somewhere() -> None:
    for path in (README, GUIDE, reference.PAGE, *ROOT.glob("[A-Z]*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_guide_names_every_query_and_command() -> None:
    text = GUIDE.read_text()
    commands = get_command(actstore_cli.app).commands  # type: ignore[attr-defined]
    assert [name for name in QUERIES if f"actstore.{name}(" not in text] == []
    assert [name for name in commands if f"actstore {name}" not in text] == []


def test_a_block_that_fails_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("One\n\n```python\na = 1\na / 0\n```\n\n```bash\nfalse\n```\n\n    bare\n")
    python, bash, bare = blocks(page)
    reader = Reader()
    with pytest.raises(ZeroDivisionError) as division:
        reader.do(python)
    assert division.traceback[-1].path == page and division.traceback[-1].lineno == 5 - 1
    with pytest.raises(subprocess.CalledProcessError):
        reader.do(bash)
    with pytest.raises(AssertionError, match=r"page\.md:12: no language"):
        reader.do(bare)


# The reference, and the docstrings that it is made of


def test_reference_is_what_the_docstrings_say() -> None:
    assert reference.PAGE.read_text() == reference.render(), "run: python tests/make_reference.py"


def public() -> Iterator[Any]:
    """Everything in the reference: name, object, whether it needs an example."""
    for prefix, module in (("", actstore), ("plot.", plot), ("errors.", errors)):
        for name, own in reference.members(module).items():
            yield pytest.param(own, module is not errors, id=prefix + name)
            if inspect.isclass(own):
                for method, value in reference.public(own).items():
                    yield pytest.param(value, False, id=f"{prefix}{name}.{method}")


@pytest.mark.parametrize(("own", "needs_example"), list(public()))
def test_docstring_is_complete(own: Any, needs_example: bool) -> None:
    parts = {section.kind.value: section.value for section in reference.sections(own)}
    assert parts, "no docstring"
    rows = [row for kind in ("parameters", "attributes") for row in parts.get(kind, ())]
    assert [row.name for row in rows if not row.description] == []
    assert "examples" in parts or not needs_example
    if not reference.is_made_by_hand(own):
        return
    documented = [name.strip() for row in rows for name in row.name.split(",")]
    bare = {"annotation": inspect.Parameter.empty, "default": inspect.Parameter.empty}
    expected = [str(p.replace(**bare)) for p in reference.arguments(own)]
    if inspect.isclass(own):  # which has attributes, too
        assert [name for name in expected if name not in documented] == []
    else:
        assert documented == expected
        nothing = inspect.signature(own).return_annotation in (None, "None")
        assert nothing or {"returns", "yields"} & parts.keys()
