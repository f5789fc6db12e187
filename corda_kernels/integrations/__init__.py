"""Statistics for other methods, axolotl's plugin, and the former address of `peft_corda`."""
