"""Scores and uses of a trained encoder, from any Hugging Face folder."""
