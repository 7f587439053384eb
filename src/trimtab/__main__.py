"""``python -m trimtab``, for where the command itself is not on the PATH."""

from trimtab.cli import main

if __name__ == "__main__":
    main()
