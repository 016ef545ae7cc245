"""Measured ratios against peers: `make bench`, or `python -m bench [names]`."""
