"""The library inside other tools: PEFT's CorDA, and statistics for other methods."""
