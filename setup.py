"""What pyproject.toml cannot say: the folder ``kernels/`` is the package ``visproj.kernels``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["visproj", "visproj.*"]), "visproj.kernels"],
    package_dir={"visproj.kernels": "kernels"},
)
