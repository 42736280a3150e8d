"""Errors that the user of visproj can cause and fix.

Each class also derives from the builtin exception that docstrings name under Raises, so that
``except ValueError`` works. The command line prints a :class:`VisprojError` or an ``OSError`` as
one line. It reports any other exception as a bug of visproj, with the traceback and the version.
"""


class VisprojError(Exception):
    """Base class of errors that the user can fix: in an argument, a file, a package, a machine."""


class InputError(VisprojError, ValueError):
    """Error for arguments or a file's content that cannot be used, alone or in combination."""


class MissingPackageError(VisprojError, ModuleNotFoundError):
    """Error for a package that is not installed; the command line says how to install it."""


class BackendError(VisprojError, RuntimeError):
    """Error for a requested backend that cannot run on this machine."""


class NotFiniteError(VisprojError, FloatingPointError):
    """Error for a loss or a gradient that is not finite in training."""
