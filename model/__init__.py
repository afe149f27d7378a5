"""The packed ModernBERT encoder, its attention backends and its Hugging Face form."""
