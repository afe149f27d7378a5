"""The speed of training; see `python -m train.benchmark --help`."""
