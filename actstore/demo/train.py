"""How the demo model was made: ``python -m actstore.demo.train``.

A byte-level BPE tokenizer of 2,048 tokens and a GPT-2 of 6 layers × 128 (1.5 million parameters)
are trained on the training part of `actstore.demo.corpus`, and written to ``model/`` with the
record of the training, ``training.json``. It needs one CPU core and about twenty minutes.

The corpus and the numbers of a run depend on the version of Python and torch, which are recorded;
with the same ones on the same machine, the seed and the number of steps give the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from . import MODEL_DIR
from .corpus import Document, documents

EOT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 256
BATCH = 8
WEIGHT_DECAY = 0.1
WARM_UP = 0.02  # of all steps


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer.

    Parameters
    ----------
    texts : list of str
        The training texts.

    Returns
    -------
    PreTrainedTokenizerFast
        With ``<|endoftext|>`` as token 0, the beginning and the end of a sequence.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOT,
        eos_token=EOT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(ids: list[list[int]], offset: int = 0) -> torch.Tensor:
    """Join documents, ``<|endoftext|>`` before each, and cut the stream into windows.

    Parameters
    ----------
    ids : list of list of int
        The tokens of each document.
    offset : int
        Where in the stream the first window begins.

    Returns
    -------
    torch.Tensor
        (windows, 256); what is left at the end is dropped.
    """
    stream = np.concatenate([np.array([0, *i]) for i in ids])[offset:]
    n = len(stream) // CONTEXT
    return torch.from_numpy(stream[: n * CONTEXT].reshape(n, CONTEXT))


def batches(ids: list[list[int]], seed: int) -> Iterator[torch.Tensor]:
    """Yield batches for ever: each epoch in another order and cut at other places.

    Parameters
    ----------
    ids : list of list of int
        The tokens of each document.
    seed : int
        Of the order and the cuts.

    Yields
    ------
    torch.Tensor
        (8, 256)
    """
    rng = np.random.default_rng(seed)
    while True:
        shuffled = [ids[i] for i in rng.permutation(len(ids))]
        windows = pack(shuffled, int(rng.integers(CONTEXT)))
        windows = windows[rng.permutation(len(windows))]
        for i in range(0, len(windows) - BATCH + 1, BATCH):
            yield windows[i : i + BATCH]


def new_model(seed: int, dropout: float) -> GPT2LMHeadModel:
    """Build the model with fresh weights.

    Parameters
    ----------
    seed : int
        Of the weights, and of the dropout that follows.
    dropout : float
        Of the embeddings and of both additions to the residual stream; the attention
        probabilities have none.

    Returns
    -------
    GPT2LMHeadModel
        In training mode.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=6,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        initializer_range=0.06,  # GPT-2's 0.02 is small for 128 wide, and slow to start
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,  # while training
    )
    return GPT2LMHeadModel(config).train()


def mean_loss(model: GPT2LMHeadModel, windows: torch.Tensor) -> float:
    """Cross-entropy of the next token within windows.

    Parameters
    ----------
    model : GPT2LMHeadModel
        Left in evaluation mode.
    windows : torch.Tensor
        (windows, 256)

    Returns
    -------
    float
        Nats per token.
    """
    model.eval()
    with torch.no_grad():
        # Equal windows, so the mean over them is the mean over the tokens; only the last batch
        # can be smaller.
        sums = [model(input_ids=b, labels=b).loss.double() * len(b) for b in windows.split(BATCH)]
    return float(torch.stack(sums).sum()) / len(windows)


def unigram_entropy(windows: torch.Tensor) -> float:
    """Entropy of the tokens' own frequencies: no model without context can do better.

    Parameters
    ----------
    windows : torch.Tensor
        (windows, 256)

    Returns
    -------
    float
        Nats per token.
    """
    p = torch.bincount(windows.flatten()).double() / windows.numel()
    return float(torch.special.entr(p).sum())


def learning_rate(progress: float, peak: float) -> float:
    """Warm up linearly, then fall along a cosine to a hundredth of the peak.

    Parameters
    ----------
    progress : float
        From 0 to 1.
    peak : float
        The highest rate.

    Returns
    -------
    float
        The rate.
    """
    if progress < WARM_UP:
        return peak * progress / WARM_UP
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    return peak * (0.01 + 0.99 * cosine)


class Trainer:
    """AdamW with clipped gradients, in bfloat16 where it is safe.

    Parameters
    ----------
    model : GPT2LMHeadModel
        The model to train.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]  # biases and norms do not decay
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=(0.9, 0.95),
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def step(self, batch: torch.Tensor, lr: float) -> float:
        """Take one step.

        Parameters
        ----------
        batch : torch.Tensor
            (8, 256)
        lr : float
            The learning rate.

        Returns
        -------
        float
            The loss before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(input_ids=batch, labels=batch).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def steps_in(minutes: float, ids: list[list[int]], dropout: float) -> int:
    """Measure how many steps fit into a time, on a model that is then thrown away.

    Parameters
    ----------
    minutes : float
        The time.
    ids : list of list of int
        The tokens of each training document.
    dropout : float
        As in `new_model`.

    Returns
    -------
    int
        The number of steps.
    """
    trainer = Trainer(new_model(0, dropout))
    source = batches(ids, 0)
    for _ in range(3):  # the first are slower
        trainer.step(next(source), 0.0)
    start = time.perf_counter()
    for _ in range(20):
        trainer.step(next(source), 0.0)
    return max(1, int(minutes * 60 / (time.perf_counter() - start) * 20))


def sizes(docs: list[Document], ids: list[list[int]]) -> dict[str, int]:
    """Count one part of the corpus.

    Parameters
    ----------
    docs : list of Document
        The documents.
    ids : list of list of int
        Their tokens.

    Returns
    -------
    dict of str to int
        "documents", "bytes" and "tokens".
    """
    return {
        "documents": len(docs),
        "bytes": sum(len(d.text.encode()) for d in docs),
        "tokens": sum(map(len, ids)),
    }


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model with half-precision weights, and its tokenizer.

    Parameters
    ----------
    model : GPT2LMHeadModel
        The trained model; its weights are rounded to float16 in place.
    tokenizer : PreTrainedTokenizerFast
        Its tokenizer.
    out : Path
        The folder.
    """
    for p in model.parameters():
        p.data = p.data.half().float()
    model.config.use_cache = True
    model.half().save_pretrained(out)
    model.float()
    tokenizer.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    # Stored in half the space, but meant to run in float32: transformers loads a model in the
    # type that its config names, and float16 is slow and coarse on a CPU.
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Train the demo model and write it.

    Parameters
    ----------
    argv : list of str, optional
        The arguments; those of the command line by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m actstore.demo.train", description="Train the demo model and write it."
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="about how long to train")
    parser.add_argument("--steps", type=int, help="train exactly so long instead")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # so that the sums, and with them the model, do not depend on it

    docs = {held: documents(held_out=held) for held in (False, True)}
    tokenizer = train_tokenizer([d.text for d in docs[False]])
    ids = {
        held: [tokenizer.encode(d.text, add_special_tokens=False, verbose=False) for d in part]
        for held, part in docs.items()
    }
    train_windows, test_windows = pack(ids[False]), pack(ids[True])
    print({held: sizes(docs[held], ids[held]) for held in docs})

    steps = args.steps or steps_in(args.minutes, ids[False], args.dropout)
    print(f"{steps} steps of {BATCH} × {CONTEXT} tokens")
    model = new_model(args.seed, args.dropout)
    trainer = Trainer(model)
    source = batches(ids[False], args.seed)
    start = time.perf_counter()
    for step in range(steps):
        loss = trainer.step(next(source), learning_rate((step + 1) / steps, args.lr))
        if (step + 1) % 100 == 0:
            line = f"step {step + 1}: loss {loss:.3f}"
            if (step + 1) % 500 == 0:  # only to be watched
                line += f", held-out loss {mean_loss(model, test_windows):.3f}"
                model.train()
            print(f"{line}, {(time.perf_counter() - start) / 60:.1f} min", flush=True)
    minutes = (time.perf_counter() - start) / 60

    unrounded = mean_loss(model, test_windows)
    save(model, tokenizer, args.out)
    record = {
        "corpus": "pydoc_data.topics and the docstrings of the standard library",
        "python": platform.python_version(),
        "torch": version("torch").split("+")[0],
        "transformers": version("transformers"),
        "tokenizers": version("tokenizers"),
        "seed": args.seed,
        "steps": steps,
        "batch": [BATCH, CONTEXT],
        "tokens_seen": steps * BATCH * CONTEXT,
        "learning_rate": args.lr,
        "weight_decay": WEIGHT_DECAY,
        "dropout": args.dropout,
        "wall_minutes": round(minutes, 1),
        "parameters": model.num_parameters(),
        "training": sizes(docs[False], ids[False]),
        "held_out": sizes(docs[True], ids[True]),
        "unit": "nats per token",
        "training_loss": round(mean_loss(model, train_windows), 4),
        "held_out_loss": round(mean_loss(model, test_windows), 4),
        "held_out_loss_before_rounding_to_float16": round(unrounded, 4),
        "held_out_unigram_entropy": round(unigram_entropy(test_windows), 4),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
