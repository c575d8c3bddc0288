"""The package's shape: imports point one way, importing is quick, the public names are there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import actstore

ROOT = Path(actstore.__file__).parent

# Each module may import the ones before it, and its own package.
ORDER = [
    "errors",
    "schema",
    "kinds",
    "codecs",
    "aliases",
    "hookpoints",
    "select",
    "records",
    "tokenise",
    "corpus",
    "stats",
    "storage",
    "readonly",
    "remote",
    "zipped",
    "places",
    "shard",
    "plan",
    "journal",
    "root",
    "guard",
    "skeleton",
    "scaling",
    "pool",
    "sketched",
    "sketch",
    "tables",
    "seal",
    "loader",
    "like",
    "arrays",
    "store",
    "verifying",
    "concatenation",
    "hub",
    "resketch",
    "writer",
    "demo",
    "capture",
    "head",
    "models",
    "fill",
    "queries",
    "travel",
    "plot",
    "wire",
    "server",
    "report",
]


def imported(path: Path) -> set[str]:
    """Our own top-level modules that a file imports, wherever in the file it does."""
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = (*base, *(node.module or "").split(".")) if node.module else base
            names = [(*target, a.name) for a in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(a.name.split(".")) for a in node.names]
        else:
            continue
        found |= {n[1] for n in names if n[0] == "actstore" and len(n) > 1}
        found |= {"cli" for n in names if n[0] == "actstore_cli"}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    if own == "__init__":
        return  # names there are loaded lazily
    allowed = {*ORDER[: ORDER.index(own) + 1], "__version__"}
    if own == "stats":
        allowed = {"stats", "errors"}
    assert imported(path) <= allowed


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import actstore; "
        "print(time.perf_counter() - t < 0.5, 'torch' in sys.modules, 'starlette' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False", "False"]


def test_pictures_and_files_are_loaded_when_asked_for():
    """Neither importing actstore nor asking needs matplotlib."""
    code = """
import sys, actstore
heavy = ("torch", "matplotlib", "distributed", "xarray")
seen = lambda: [name for name in heavy if name in sys.modules]
print(seen(), "plot" in dir(actstore), "save" in dir(actstore))
import numpy as np, xarray as xr
acts = xr.DataArray(np.eye(3, dtype="f4"), dims=("token", "neuron"))
result = actstore.compute(actstore.moments(acts))
print(actstore.save.__module__, "matplotlib" in sys.modules, "torch" in sys.modules)
print(actstore.plot.__name__, actstore.plot.draw is not None, actstore.plot is actstore.plot)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [
        "[] True True",
        "actstore.wire False False",
        "actstore.plot True True",
    ]


def test_opening_and_asking_load_no_torch():
    code = "import sys, actstore; actstore.open, actstore.moments; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_public_names():
    for name in actstore.__all__:
        assert getattr(actstore, name) is not None
    assert set(actstore.__all__) <= set(dir(actstore))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = actstore.nonsense
