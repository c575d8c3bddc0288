"""The command line: thin commands over the library.

Data goes to stdout, messages and progress to stderr. Exit status 1 is a failure, 2 a wrong
question.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from actstore.errors import ActstoreError, UsageError

from .bench import add_bench_commands
from .demo import add_demo_command
from .dump import add_dump_commands
from .hub import add_hub_commands
from .output import say
from .plot import add_plot_commands
from .query import add_query_commands
from .report import add_report_command
from .serve import add_serve_command
from .store import add_store_commands
from .travel import add_travel_commands

__all__ = ["app", "main"]

app = typer.Typer(
    name="actstore",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Run a model once, keep its activations in a labelled Zarr store, query them ever after.",
    epilog="Example: actstore demo",
)


@app.callback()
def _everywhere(
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Where s3:// is, if not at Amazon; as AWS_ENDPOINT_URL in the environment."
        ),
    ] = None,
) -> None:
    if endpoint is not None:
        os.environ["AWS_ENDPOINT_URL"] = endpoint


add_demo_command(app)
add_dump_commands(app)
add_store_commands(app)
add_travel_commands(app)
add_query_commands(app)
add_plot_commands(app)
add_report_command(app)
add_serve_command(app)
add_hub_commands(app)
add_bench_commands(app)


def main() -> NoReturn:
    """Run the command line; errors made for people are printed as one message."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app(standalone_mode=True)
    except UsageError as error:
        say(f"actstore: {error}")
        sys.exit(2)
    except ActstoreError as error:
        say(f"actstore: {error}")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has gone (| head); nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _terminated(*_: object) -> None:
    """SIGTERM ends a command as Ctrl-C does: cleanly."""
    raise KeyboardInterrupt
