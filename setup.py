"""Package mapping; everything else is in pyproject.toml.

`kernels/` and `data/shard_tools/` are top-level folders of the repository but parts of the `mpmae` package, so that no
top-level module named `kernels` or `data` is ever installed.
"""

from setuptools import find_packages, setup

MAPPED = {"mpmae.kernels": "kernels", "mpmae.shard_tools": "data/shard_tools"}

packages = find_packages(include=["mpmae", "mpmae.*"])
for package, folder in MAPPED.items():
    packages.append(package)
    packages += [f"{package}.{sub}" for sub in find_packages(folder)]

setup(packages=packages, package_dir=MAPPED)
