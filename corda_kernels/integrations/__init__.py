"""Statistics for other methods, and the former address of `corda_kernels.peft_corda`."""
