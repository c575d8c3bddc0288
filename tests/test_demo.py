"""The embedded model and its corpus: honest numbers, a stable split, a small folder."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from actstore.demo import MODEL_DIR, corpus
from actstore.demo.corpus import demo_records, documents, is_held_out
from actstore.errors import CorpusError

CONTEXT = 256
WINDOWS = 40


@pytest.fixture(scope="module")
def docs():
    return documents()


@pytest.fixture(scope="module")
def model_and_tokenizer():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def record():
    return json.loads((MODEL_DIR / "training.json").read_text())


# The corpus


def test_corpus_is_sorted_and_has_both_sources(docs):
    names = [d.name for d in docs]
    assert names == sorted(set(names))
    assert {d.source for d in docs} == {"topics", "docstrings"}
    assert all(d.name.startswith(d.source + "/") for d in docs)


def test_split_is_by_name_alone(docs):
    assert all(d.held_out == (zlib.crc32(d.name.encode()) % 10 == 0) for d in docs)
    # Fixed, so that another hash cannot slip in: the packaged model was trained on this split.
    assert is_held_out("docstrings/unittest.case")
    assert is_held_out("topics/calls")
    assert not is_held_out("docstrings/json")
    assert not is_held_out("topics/if")
    assert 0.05 < np.mean([d.held_out for d in docs]) < 0.2


def test_parts_are_disjoint_and_the_same_on_every_reading(docs):
    held, kept = documents(held_out=True), documents(held_out=False)
    assert held == [d for d in docs if d.held_out]
    assert kept == [d for d in docs if not d.held_out]
    assert {d.name for d in held}.isdisjoint(d.name for d in kept)


def test_no_held_out_paragraph_is_trained_on(docs):
    # Topics contain one another word for word, so splitting by name alone would leak.
    def paragraphs(held):
        texts = (d.text for d in docs if d.held_out == held)
        words = {" ".join(p.split()) for t in texts for p in t.split("\n\n")}
        return {w for w in words if len(w) >= corpus.SHORTEST_REPEAT}

    assert paragraphs(True).isdisjoint(paragraphs(False))


def test_site_packages_and_tests_are_left_out(docs):
    parts = {part for d in docs for part in d.name.split("/")[1].split(".")}
    assert parts.isdisjoint({"site-packages", "torch", "numpy", "pip"})
    assert not any(d.name.startswith("docstrings/test.") for d in docs)


def test_docstrings_without_importing(tmp_path, monkeypatch):
    body = "raise SystemExit('imported')"
    doc = '"""{} is a sentence of this module, of which there is only one."""'
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "config-3").mkdir()
    for i in range(30):
        lines = [doc.format(f"Module {i} " * 20), body, "class C:"]
        lines += [f"    {doc.format(f'Class {i}')}", "    async def f(self):"]
        lines += [f'        """Method {i}\n\n        Less\n          more\n        """']
        (tmp_path / "pkg" / f"m{i}.py").write_text("\n".join(lines))
    (tmp_path / "pkg" / "__init__.py").write_text(doc.format("The package " * 20))
    (tmp_path / "pkg" / "broken.py").write_text("print 'python 2'")
    (tmp_path / "pkg" / "test" / "t.py").write_text(doc.format("A test " * 40))
    (tmp_path / "config-3" / "c.py").write_text(doc.format("A build " * 40))
    monkeypatch.setattr(corpus, "_stdlib", lambda: tmp_path)
    found = {d.name: d.text for d in documents() if d.source == "docstrings"}
    assert set(found) == {"docstrings/pkg"} | {f"docstrings/pkg.m{i}" for i in range(30)}
    one = found["docstrings/pkg.m7"]
    assert one.startswith("Module 7") and one.endswith("Method 7\n\nLess\n  more")
    assert one.index("Module 7") < one.index("Class 7") < one.index("Method 7")


def test_installation_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_stdlib", lambda: tmp_path / "python311.zip")
    assert {d.source for d in documents()} == {"topics"}
    records = demo_records()
    assert records and {r["source"] for r in records} == {"topics"}
    monkeypatch.setattr(corpus, "_topics", dict)
    with pytest.raises(CorpusError, match=r"python311\.zip"):
        documents()


def test_installation_without_topics(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert {d.source for d in documents(held_out=True)} == {"docstrings"}


def test_demo_records_are_held_out(docs):
    records = demo_records()
    assert demo_records() == records
    text_of = {d.name: d.text for d in docs if d.held_out}
    assert all(r["text"] in text_of[r["name"]] for r in records)
    assert all(r["name"].startswith(r["source"] + "/") for r in records)
    assert all(set(r) == {"text", "source", "name"} for r in records)
    size = {
        s: sum(len(r["text"].encode()) for r in records if r["source"] == s)
        for s in ("topics", "docstrings")
    }
    assert 60_000 < sum(size.values()) < 100_000
    assert min(size.values()) > 20_000
    assert len({r["name"] for r in records}) >= 20
    assert json.loads(json.dumps(records)) == records
    assert sum(len(r["text"]) for r in demo_records(5_000)) <= 5_000


# The model


def test_importing_the_demo_is_light():
    code = (
        "import sys; from actstore.demo import MODEL_DIR; import actstore.demo.corpus; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_folder_is_small_and_anonymous():
    files = [p for p in MODEL_DIR.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 5_000_000
    assert {p.name for p in files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    for path in files:
        if path.suffix == ".json" and path.name != "tokenizer.json":
            text = path.read_text()
            assert "_name_or_path" not in text
            assert str(Path.home()) not in text and "/tmp" not in text


def test_tokenizer_is_byte_level(model_and_tokenizer, docs):
    model, tokenizer = model_and_tokenizer
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.bos_token == "<|endoftext|>"
    text = next(d.text for d in docs if d.held_out)[:2000] + " naïve 象\t\x00 \n  end "
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) < 0.5 * len(text.encode())


def test_held_out_loss_is_well_below_the_unigram_entropy(model_and_tokenizer, docs, record):
    import torch

    model, tokenizer = model_and_tokenizer
    stream: list[int] = []
    for d in docs:
        if d.held_out:
            stream += [0, *tokenizer.encode(d.text, add_special_tokens=False, verbose=False)]
    counts = np.bincount(stream)
    p = counts[counts > 0] / len(stream)
    entropy = -(p * np.log(p)).sum()

    n = len(stream) // CONTEXT
    chosen = np.random.default_rng(0).choice(n, size=min(WINDOWS, n), replace=False)
    windows = torch.tensor(stream[: n * CONTEXT]).reshape(n, CONTEXT)[chosen]
    total = 0.0
    with torch.no_grad():
        for b in windows.split(8):  # not the model's own loss, so that this is a second opinion
            logp = model(b).logits[:, :-1].log_softmax(-1)
            total -= logp.gather(-1, b[:, 1:, None]).double().sum().item()
    loss = total / windows[:, 1:].numel()

    assert loss < 0.65 * entropy
    assert loss == pytest.approx(record["held_out_loss"], abs=0.35)
    assert entropy == pytest.approx(record["held_out_unigram_entropy"], abs=0.3)
    assert record["training_loss"] < record["held_out_loss"]


def test_model_loads_in_float32_and_continues_a_text(model_and_tokenizer, record):
    import torch
    from transformers import AutoModel

    model, tokenizer = model_and_tokenizer
    assert model.dtype == torch.float32
    assert model.num_parameters() == record["parameters"]
    assert AutoModel.from_pretrained(MODEL_DIR, local_files_only=True).config.n_layer == 6
    prompt = tokenizer("Return True if the", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(out[0])
    assert text.startswith("Return True if the") and len(text) > len("Return True if the")
