"""What several folders share and belongs to none: configuration, files, randomness."""
