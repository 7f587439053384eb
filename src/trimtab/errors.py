"""Errors that a user can act on."""


class TrimtabError(Exception):
    """Something the user can mend; the message names the thing and the remedy.

    The command line prints the message alone and exits with status 2. Anything else that is raised is a bug
    and keeps its traceback.
    """


class DataError(TrimtabError):
    """A manifest, image or text that cannot be used."""


class ModelError(TrimtabError):
    """A base, student or adapted folder that cannot be used or does not fit."""


class RecipeError(TrimtabError):
    """A recipe with an unknown key or an impossible value."""


class TrainingStopped(TrimtabError):  # noqa: N818 - it reads as what happened
    """Training ended early for a reason in the message: NaN, collapse, no space; finished work is kept."""


class OutOfMemory(TrimtabError, MemoryError):  # noqa: N818 - as the above
    """Memory does not even do for one item; a training step or validation says the rest."""


class Interrupted(TrainingStopped):
    """Training stopped because the user or a scheduler asked for it; the same command goes on.

    Attributes:
        told: another process of the run prints the message.
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


MORE_MEMORY = (
    "free what other programs hold, or set CUDA_VISIBLE_DEVICES to the number of a GPU that is free, or to nothing for "
    "the CPU, as --device cpu does"
)
"""What to do where memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of its GPU; torch has several ways to say so."""
    words = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")  # the last of CUDA's libraries
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
