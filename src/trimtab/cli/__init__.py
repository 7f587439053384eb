"""The command line: parse, call, print. What a command does stands in `trimtab.recipes`.

Everything heavy is imported inside the commands, so that ``trimtab --help`` answers at once. Each module beside this
one holds commands; importing it adds them to the application.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback

from trimtab import __version__
from trimtab.cli import adapting, prompt, report, serve, vectors  # noqa: F401 - they add their commands
from trimtab.cli.app import INTERRUPTED, app
from trimtab.cli.printing import say
from trimtab.controls import without_controls
from trimtab.errors import MORE_MEMORY, is_out_of_memory

__all__ = ["INTERRUPTED", "app", "main"]


class _Warnings(logging.Handler):
    """Shows each warning of trimtab once, on stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.shown:
            self.shown.add(message)
            say(f"{record.levelname.lower()}: {message}", "yellow")


def main() -> None:
    """Entry point of the ``trimtab`` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # class names and paths are UTF-8 even where the locale is not
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    # What matters of transformers' chatter is raised as an error by `trimtab.towers`.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait take the cores from each other when a machine is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("trimtab").addHandler(_Warnings())
    logging.getLogger("trimtab").propagate = False
    try:
        try:
            app()
        finally:
            with contextlib.suppress(BrokenPipeError):
                print(end="", flush=True)  # here rather than at exit, so that a full disk is noticed
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            say(f"error: cannot write {error.filename or 'the output'}: the disk is full: free some space", "bold red")
            if sys.stdout is not None:  # what it still holds would be written, and fail, once more at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(2)
        if is_out_of_memory(error):
            reason = " ".join(str(error).split())[:300]
            advice = f"give a lower --batch-size or training.batch_size, or {MORE_MEMORY}"
            say(f"error: out of memory: {advice}" + (f" ({reason})" if reason else ""), "bold red")
            sys.exit(2)
        print(without_controls(traceback.format_exc()), end="", file=sys.stderr)
        say(f"This is a bug in trimtab {__version__}: please report it with the text above and the command.", "red")
        sys.exit(1)
