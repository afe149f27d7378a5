"""A made-up corpus in the formats of the real sources, for the demo and for tests."""
