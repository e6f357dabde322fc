"""The one error a person is meant to read."""


class PairtileError(Exception):
    """Something the user can mend: a recipe, a path, a file, a world size.

    The message is one line that says what was given, what was expected and what to do. Command line entry
    points print it alone and exit with code 2; every other exception is a bug and keeps its traceback.
    """


class RecipeError(PairtileError):
    """A :class:`PairtileError` that every rank meets alike, so that rank 0 alone tells it."""


class RankFailure(PairtileError):
    """Another rank died, hangs or stopped; the message names it. Nothing to mend here: the run can be started again."""
