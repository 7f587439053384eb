"""The application that every command joins, and how each of them ends."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trimtab import __version__
from trimtab.cli.printing import say
from trimtab.errors import TrimtabError

INTERRUPTED = 130  # 128 + SIGINT, as shells count


class _Commands(TyperGroup):
    """Ends every command alike: a sentence and a status instead of a traceback, where the user can mend it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TrimtabError as error:
            say(f"error: {error}", "bold red")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            say(
                "stopped by Ctrl-C. Files that were finished are whole, and the same command continues from the "
                "last checkpoint where there is one.",
                "yellow",
            )
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    name="trimtab",
    cls=_Commands,
    help="Steer a frozen vision-language model to a new language, domain or objective by training a small part.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="'starter', a transformers folder or hub id, or an adapted folder.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""
