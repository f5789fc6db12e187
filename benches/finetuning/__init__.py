"""What `benches/finetune.py` is made of: the claims of CorDA and CorDA++, tried on a real model."""
