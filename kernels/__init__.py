"""Triton operations, each beside its plain PyTorch reference."""
