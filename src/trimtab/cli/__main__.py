"""So that ``python -m trimtab.cli`` is the command."""

from trimtab.cli import main

main()
