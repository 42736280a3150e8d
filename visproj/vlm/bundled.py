"""Files that ship inside other installed packages, found without importing those packages."""

from importlib.util import find_spec
from pathlib import Path

from visproj.errors import MissingPackageError


def bundled_image(name: str) -> Path:
    """Return the path of an image, given as the name of an installed package and the path in it.

    Raises:
        ModuleNotFoundError, FileNotFoundError: As :func:`bundled_file` says.
    """
    package, _, inside = name.partition("/")
    return bundled_file(package, inside)


def bundled_file(package: str, relative: str) -> Path:
    """Return the path of ``relative`` inside the installed ``package``.

    Raises:
        ModuleNotFoundError: The package is not installed.
        FileNotFoundError: The package is installed and has no such file.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"the package {package} is not installed", name=package)
    path = Path(spec.submodule_search_locations[0], relative)
    if not path.is_file():
        raise FileNotFoundError(f"the installed package {package} has no file {relative}")
    return path
