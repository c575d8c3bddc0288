"""`actstore plan` and `actstore dump`."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from actstore.errors import UsageError
from actstore.schema import MLP_STAGES

from .output import print_json, print_table, progress, say, size, some

if TYPE_CHECKING:
    from actstore.plan import Plan

__all__ = ["add_dump_commands"]

_CORPUS = (
    "context",
    "bos",
    "windows",
    "before",
    "after",
    "limit",
    "not_beside_digits",
    "from_token",
    "plain",
    "keep",
    "skip_special",
    "skip_first",
    "max_tokens",
)
_PLAN = (
    "stages",
    "layers",
    "dtype",
    "buffer",
    "passes",
    "batch_tokens",
    "padding_side",
    "sketch",
    "sketch_by",
    "predictions",
    "outcomes",
)

Panel = {
    "model": "Model",
    "input": "Input",
    "windows": "Event-locked windows",
    "keep": "Which tokens to keep",
    "capture": "What to capture",
    "run": "Running",
}


def _option(help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=Panel[panel], show_default=True)


def job(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or 'demo'.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A text file, JSONL ('text' or 'input_ids', other keys become labels), '-' for "
            "standard input, or a Hugging Face dataset.",
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT.zarr", help="The store to write, a path or s3://... URL.")
    ],
    model_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _option("Element type to run the model in; auto: as its weights are stored.", "model"),
    ] = "auto",
    device: Annotated[str, _option("auto, cpu, cuda, cuda:1 ...", "model")] = "auto",
    revision: Annotated[str | None, _option("Branch, tag or commit on the hub.", "model")] = None,
    trust_remote_code: Annotated[
        bool, _option("Run code that comes with the model.", "model", "--trust-remote-code")
    ] = False,
    config: Annotated[str | None, _option("Configuration of a dataset.", "input")] = None,
    split: Annotated[str | None, _option("Split of a dataset.", "input")] = None,
    column: Annotated[str | None, _option("Column or key that holds the text.", "input")] = None,
    context: Annotated[
        int | None, _option("Longest sequence; default the model's own limit.", "input")
    ] = None,
    bos: Annotated[
        Literal["auto", "always", "never"],
        _option("Special tokens round each sequence; auto: as the tokenizer does.", "input"),
    ] = "auto",
    windows: Annotated[
        list[str] | None,
        _option(
            "LABEL=TOKEN: cut a window round each TOKEN (LABEL==TEXT matches white space, too). "
            "May be repeated.",
            "windows",
        ),
    ] = None,
    before: Annotated[int, _option("Tokens before the event.", "windows")] = 20,
    after: Annotated[int, _option("Tokens after the event.", "windows")] = 10,
    limit: Annotated[int | None, _option("At most so many windows a label.", "windows")] = None,
    not_beside_digits: Annotated[
        list[str] | None,
        _option("LABEL whose token does not count beside a digit (3.14).", "windows"),
    ] = None,
    from_token: Annotated[int, _option("Where in each text to begin looking.", "windows")] = 0,
    plain: Annotated[
        str | None, _option("LABEL[=N]: add one uncut sequence of N tokens.", "windows")
    ] = None,
    keep: Annotated[str | None, _option('Token expression, such as "offset == 0".', "keep")] = None,
    skip_special: Annotated[
        bool, _option("Leave out special tokens.", "keep", "--skip-special")
    ] = False,
    skip_first: Annotated[int, _option("Leave out the first N of each sequence.", "keep")] = 0,
    max_tokens: Annotated[int | None, _option("Keep at most so many tokens.", "keep")] = None,
    stages: Annotated[
        str,
        _option(
            "Comma list of hidden, resid_pre, resid_mid, resid_post, attn_z, attn_out, mlp_in, "
            "mlp_pre, mlp_post, mlp_out, or NAME=path.with.{layer}.in.it[:input|:output]; names of "
            "TransformerLens, as blocks.3.mlp.hook_post, are understood.",
            "capture",
        ),
    ] = ",".join(MLP_STAGES),
    layers: Annotated[str | None, _option("As 0,3-5 or -1; default all.", "capture")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        _option("Stored element type; default the model's.", "capture"),
    ] = None,
    sketch: Annotated[
        bool,
        _option("Make statistics while writing.", "capture", "--sketch/--no-sketch"),
    ] = True,
    sketch_by: Annotated[
        str | None, _option("A label whose values the sketches keep apart.", "capture")
    ] = None,
    predictions: Annotated[
        int,
        _option("Keep the model's own N likeliest next tokens of every token.", "capture"),
    ] = 0,
    outcomes: Annotated[
        bool,
        _option(
            "Keep loss, entropy and the true next token's rank of every token, for questions such "
            "as --tokens 'loss > 5'.",
            "capture",
            "--outcomes",
        ),
    ] = False,
    buffer: Annotated[
        str, _option("Host memory for activations being gathered and written.", "run")
    ] = "1GiB",
    passes: Annotated[
        int, _option("Run the input N times, each capturing a group of layers.", "run")
    ] = 1,
    batch_tokens: Annotated[
        int | None, _option("Tokens of a batch; default 1024, on a GPU 8192.", "run")
    ] = None,
    padding_side: Annotated[
        Literal["right", "left"], _option("Where short rows are padded.", "run")
    ] = "right",
) -> dict[str, Any]:
    """What `plan` and `dump` are asked alike."""
    return locals()


def _with_job(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the parameters of `job` before its own."""
    own, shared = (
        # Evaluated, because a signature given to Typer is taken as it is.
        [p for p in inspect.signature(f, eval_str=True).parameters.values() if p.name != "asked"]
        for f in (command, job)
    )

    def wrapped(**values: Any) -> None:
        asked = {p.name: values.pop(p.name) for p in shared}
        command(asked=asked, **values)

    wrapped.__signature__ = inspect.Signature(shared + own)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in shared + own}
    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    return wrapped


def add_dump_commands(app: typer.Typer) -> None:
    app.command(epilog="Example: actstore plan demo book.txt book.zarr --stages hidden,mlp_post")(
        _with_job(plan)
    )
    app.command(
        epilog="Example: actstore dump demo book.txt book.zarr --stages hidden --layers -1"
    )(_with_job(dump))


def plan(
    asked: dict[str, Any],
    no_weights: Annotated[
        bool,
        typer.Option("--no-weights", help="Plan from the configuration alone; estimates no time."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a dump would write: tokens, blocks, bytes, files, time. Writes nothing."""
    from actstore.errors import WriteError
    from actstore.places import storage_at

    model, _, made, _ = _prepare(asked, meta=no_weights)
    seconds = None if no_weights else _estimate(model, made)
    free = storage_at(asked["out"]).free_bytes()
    facts = {
        "tokens": made.n_tokens,
        "inputs": len(made.corpus.token_ids),
        "computed_tokens": made.computed_tokens,
        "sequences": made.corpus.n_sequences,
        "batches": len(made.batches),
        "blocks": made.n_blocks,
        "block_tokens": made.block_tokens,
        "passes": len(made.passes),
        "files": made.shards,
        "nbytes": made.nbytes,
        "predictions": made.predictions,
        "outcomes": made.outcomes,
        "free_bytes": free,
        "seconds": seconds,
        "stages": {
            s.name: {
                "layers": list(s.layers),
                "width": s.layout.width,
                "dtype": s.layout.source_dtype,
                "nbytes": made.stage_nbytes(s),
            }
            for s in made.stages
        },
        "notes": list(made.notes),
        "input_notes": made.corpus.notes,
    }
    if as_json:
        print_json(facts)
    else:
        _print_plan(made, facts)
    if made.nbytes > free:
        raise WriteError(f"{size(made.nbytes)} are needed and {size(free)} are free there")


def _print_plan(made: Plan, facts: dict[str, Any]) -> None:
    rows: list[list[Any]] = [
        [s.name, len(s.layers), s.layout.width, s.layout.source_dtype, size(made.stage_nbytes(s))]
        for s in made.stages
    ]
    if made.tables:
        own = ", ".join(dict.fromkeys(key.partition("/")[0] for key in made.tables))
        rows.append([own, "", "", "", size(made.tables_nbytes)])
    rows.append(["all", "", "", "", size(made.nbytes)])
    print_table(["stage", "layers", "neurons", "type", "bytes"], rows)
    say(
        f"{made.n_tokens:,} of {some(facts['inputs'], 'input token')} kept, "
        f"{some(facts['sequences'], 'sequence')} in {some(facts['batches'], 'batch', 'batches')} "
        f"({some(facts['computed_tokens'], 'token')} computed a pass, padding included)"
    )
    say(
        f"{some(made.n_blocks, 'block')} of {some(made.block_tokens, 'token')}, "
        f"{some(made.shards, 'file')}, {some(len(made.passes), 'pass', 'passes')}; "
        f"{size(facts['free_bytes'])} free there"
    )
    if facts["seconds"] is not None:
        say(f"about {_duration(facts['seconds'])} in the model on this machine")
    for note in made.notes:
        say(f"note: {note}")


def dump(
    asked: dict[str, Any],
    rank: Annotated[
        int | None, typer.Option(help="This process's number; default torchrun's RANK, or 0.")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(help="How many processes write; default WORLD_SIZE, or 1.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Writer threads.")] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Store NaN and inf instead of stopping.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Run a model over a text and keep its activations in a store.

    The same command again goes on where a stopped one left off, or checks and repairs what is
    there.
    """
    from actstore.fill import fill, vocab_size, vocabulary
    from actstore.writer import Writer

    began = time.monotonic()
    model, tokenizer, made, points = _prepare(asked)
    words = vocabulary(tokenizer, vocab_size(model)) if tokenizer is not None else None
    writer = Writer(
        asked["out"],
        made,
        vocabulary=words,
        rank=_rank(rank, "RANK", 0),
        world_size=_rank(world_size, "WORLD_SIZE", 1),
        threads=threads,
        allow_nonfinite=allow_nonfinite,
    )
    for note in made.notes:
        say(f"note: {note}")
    try:
        total = made.n_tokens * len(made.passes)
        with writer, progress("dump", total, "tokens") as bar:
            if writer.repaired:
                say(f"damaged, to be redone: {', '.join(writer.repaired[:8])}")
            whole = writer.sealed
            started = time.monotonic()

            def report(now: Any) -> None:
                seconds = max(time.monotonic() - started, 1e-9)
                speed = (
                    f"{now.tokens / seconds:,.0f} tokens/s {now.nbytes / seconds / 1e9:.2f} GB/s"
                )
                bar(now.tokens, speed)

            fill(model, points, writer, report)
    except KeyboardInterrupt:
        say(
            f"\nstopped: {writer.committed()} of {made.n_blocks * len(made.passes)} blocks are "
            f"complete in {asked['out']}. Run the same command again to go on."
        )
        raise typer.Exit(1) from None
    _summarise(asked["out"], writer, whole, time.monotonic() - began, as_json)


def _summarise(out: str, writer: Any, whole: bool, seconds: float, as_json: bool) -> None:
    made = writer.plan
    if as_json:
        print_json(
            {
                "store": str(out),
                "sealed": writer.sealed,
                "tokens": made.n_tokens,
                "nbytes_written": writer.bytes_written,
                "seconds": seconds,
            }
        )
    whole = whole and writer.sealed  # no longer, where another rank has something to redo
    if whole and not writer.storage.puts:
        say(f"{out} is complete and every byte of it is right: nothing to do")
    elif whole:
        say(f"{out} is mended: every byte of it is right again")
    elif writer.sealed:
        say(
            f"{out}: {made.n_tokens:,} tokens, {size(writer.bytes_written)} written in "
            f"{_duration(seconds)}. Next: actstore info {out}"
        )
    else:
        say(f"{out}: this rank's blocks are done; the last rank to finish seals the store")


def _prepare(asked: dict[str, Any], meta: bool = False) -> tuple[Any, Any, Plan, Any]:
    """Model, tokenizer, plan and hook points of a job."""
    from actstore.fill import model_corpus, plan_model
    from actstore.models import load_model
    from actstore.places import check_writable
    from actstore.records import read_records

    # Input and output are looked at first: a typo there should not wait for the model.
    check_writable(asked["out"])
    records = read_records(
        asked["source"], config=asked["config"], split=asked["split"], column=asked["column"]
    )
    model, tokenizer = load_model(
        asked["model"],
        dtype=asked["model_dtype"],
        device=asked["device"],
        revision=asked["revision"],
        trust_remote_code=asked["trust_remote_code"],
        meta=meta,
        head=bool(asked["predictions"] or asked["outcomes"]),
    )
    options = {name: asked[name] for name in _CORPUS}
    for name in ("windows", "not_beside_digits"):
        options[name] = options[name] or ()
    corpus = model_corpus(model, tokenizer, records, model=asked["model"], **options)
    wanted = {name: asked[name] for name in _PLAN}
    wanted["stages"] = [s.strip() for s in asked["stages"].split(",") if s.strip()]
    made, points = plan_model(model, tokenizer, corpus, name=asked["model"], **wanted)
    return model, tokenizer, made, points


def _estimate(model: Any, made: Plan) -> float:
    """Seconds that the forward passes will take, from one batch of middling size, run twice."""
    import torch

    from actstore.capture import base_model
    from actstore.fill import batch_kwargs
    from actstore.head import Head, last_hidden, predict

    base, ahead = base_model(model), 0.0
    sizes = [b.length * len(b.sequences) for b in made.batches]
    batch = made.batches[sorted(range(len(sizes)), key=sizes.__getitem__)[len(sizes) // 2]]
    with torch.inference_mode():
        for _ in range(2):
            started = time.perf_counter()
            hidden = last_hidden(base(**batch_kwargs(made, batch, base)))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            if made.tables:
                rows = hidden.reshape(-1, hidden.shape[-1])
                following = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
                started = time.perf_counter()
                predict(Head(model), rows, following, made.predictions, made.outcomes).cpu()
                ahead = time.perf_counter() - started
    tokens = batch.length * len(batch.sequences)
    # The head runs in one pass, and for kept tokens only.
    everything = seconds * made.computed_tokens * len(made.passes) + ahead * made.n_tokens
    return everything / tokens


def _rank(given: int | None, variable: str, default: int) -> int:
    if given is not None:
        return given
    try:
        return int(os.environ.get(variable, default))
    except ValueError:
        raise UsageError(
            f"the environment variable {variable} is {os.environ[variable]!r}: a whole number is "
            f"needed there, or --{variable.lower().replace('_', '-')}"
        ) from None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
