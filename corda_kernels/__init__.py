"""Context-oriented LoRA initialisation: CorDA and CorDA++."""

__version__ = "0.1.0"
