"""The errors that visproj raises for what its user can cause.

Each is also of the builtin kind that the docstrings name, so ``except ValueError`` keeps working.
The command line prints a :class:`VisprojError` or an ``OSError`` as one line; anything else that
reaches it is a bug of this package and is shown as one, with the traceback and the version.
"""


class VisprojError(Exception):
    """Something that the user of visproj can mend: an argument, a file, a package, a machine."""


class InputError(VisprojError, ValueError):
    """An argument, a file's content or a combination of them that cannot be used."""


class MissingPackageError(VisprojError, ModuleNotFoundError):
    """A package that this needs is not installed; the message says how to install it."""


class BackendError(VisprojError, RuntimeError):
    """The backend that was asked for cannot run here."""


class NotFiniteError(VisprojError, FloatingPointError):
    """Training met a loss or a gradient that is not finite."""
