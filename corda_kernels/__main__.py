"""`python -m corda_kernels` is `corda-kernels`."""

from corda_kernels.cli import main

main()
