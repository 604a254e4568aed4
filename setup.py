"""Which folders become which packages; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        # `optimum` holds one file of a namespace that optimum owns, so it is named exactly.
        *find_namespace_packages(".", include=["prunekit", "prunekit.*", "optimum.commands.register"]),
        *find_namespace_packages("kernels", include=["prunekit_kernels", "prunekit_kernels.*"]),
        "prunekit.recipes",
    ],
    package_dir={"prunekit_kernels": "kernels/prunekit_kernels", "prunekit.recipes": "recipes"},
)
