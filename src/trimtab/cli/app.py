"""The application that every command joins, and how each of them ends."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trimtab import __version__
from trimtab.cli.printing import say
from trimtab.errors import Interrupted, TrimtabError

INTERRUPTED = 130  # 128 + SIGINT, as shells count


class _Commands(TyperGroup):
    """Ends every command alike: a sentence and a status instead of a traceback, where the user can mend it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, with the home folder for ~ in ``--out=~/runs``, where shells leave it."""
        return super().parse_args(ctx, [_expanded(arg) for arg in args])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TrimtabError as error:
            if not (isinstance(error, Interrupted) and error.told):
                say(f"error: {error}", "bold red")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            say(
                "stopped by Ctrl-C. Files that were finished are whole, and the same command continues from the "
                "last checkpoint where there is one.",
                "yellow",
            )
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            # By name: typer brings click, or a copy of it with classes of its own.
            if type(error).__name__ == "NoSuchOption" and ctx.invoked_subcommand in ("adapt", "fewshot"):
                _explain_keys(error)
            raise


def _explain_keys(error: Any) -> None:
    """Say how values of a recipe are given, where an option was tried that is a key of recipes."""
    from trimtab.config import RECIPES

    key = error.option_name.lstrip("-")
    if key.split(".")[0] in {field.name for recipe in RECIPES.values() for field in dataclasses.fields(recipe)}:
        error.message += f" (values of a recipe are given without dashes, as {key}=VALUE)"


def _expanded(argument: str) -> str:
    option, _, value = argument.partition("=")
    if not (option.startswith("--") and value.startswith(f"~{os.sep}")):
        return argument
    return f"{option}={os.path.expanduser(value)}"  # noqa: PTH111 - a Path fails where there is no home


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
