"""Names the packages; everything else stands in pyproject.toml, which cannot name this one.

The CUDA sources in csrc/ are installed as corda_kernels/csrc, where `kernels/cuda.py` finds them.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["corda_kernels*"]), "corda_kernels.csrc"])
