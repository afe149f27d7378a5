"""Pretraining: run configuration, row order, loader, masking, loop, checkpoints, metrics."""
