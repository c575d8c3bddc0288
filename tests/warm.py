"""Runs the command line many times from one warm process: each run is a fork of it.

Started by tests as a process of its own; imports take seconds, a fork none. Reads one JSON
request a line and answers with one:

    {"argv": [...], "out": FILE, "env": {...}, "die_at": N, "plain": BOOL}  ->  {"pid": ...}
    {"wait": PID}                                                           ->  {"status": ...}

`die_at` kills the run itself at its Nth write, sync or rename, before it (even N) or after (odd).
A `plain` run obeys the modes of folders and files even where root runs it. The command "ask" puts
the questions of questions.py to a store.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any


def main() -> None:
    import torch

    torch.set_num_threads(1)
    import actstore_cli
    import questions

    import actstore.store
    import actstore.writer  # noqa: F401
    from actstore.models import load_model

    _, tokenizer = load_model("demo", device="cpu")
    tokenizer("All that is imported on first use is imported now.")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            if request["argv"][0] == "ask":
                _child(request, partial(questions.print_answers, request["argv"][1]))
            _child(request, actstore_cli.main)
        print(json.dumps({"pid": pid}), flush=True)


def _child(request: dict[str, Any], command: Callable[[], Any]) -> None:
    """Be the run; never returns."""
    code: Any = 70
    try:
        for fd, name, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["out"] + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, request["out"] + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(name, flags), fd)
        os.environ.update(request.get("env", {}))
        sys.argv = ["actstore", *request["argv"]]
        _count_operations(request.get("die_at"), request["out"] + ".ops")
        if request.get("plain"):
            _obey_modes()
        command()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _obey_modes() -> None:
    """Give up root's right to pass over the modes of files, and every other: see capset(2).

    Another user would obey them too, but may not be let into the folder that Python lies in.
    """
    version_3, this_thread = 0x20080522, 0
    header = (ctypes.c_uint32 * 2)(version_3, this_thread)
    none = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _count_operations(die_at: int | None, log: str) -> None:
    """Log what is done to files, a letter each (S: a shard, R: a record), and die at one."""
    lock, done = threading.Lock(), [0]
    if os.path.exists(log):
        os.unlink(log)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    plain_write = os.write

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            with lock:
                number = done[0]
                done[0] += 1
                plain_write(fd, _letter(name, args).encode())
            if die_at is not None and number == die_at // 2 and die_at % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if die_at is not None and number == die_at // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return operation

    for name in ("fdatasync", "fsync", "ftruncate", "rename", "replace", "unlink", "write"):
        setattr(os, name, counted(name, getattr(os, name)))


def _letter(name: str, args: tuple[Any, ...]) -> str:
    if name == "rename" and "/activation/c." in str(args[1]):
        return "S"
    if name == "rename" and re.search(r"/journal/p\d+\.b\d+\.json$", str(args[1])):
        return "R"
    return name[0]


if __name__ == "__main__":
    main()
