"""The data card: what a data set holds, where it is from and what was left out, on one page."""
