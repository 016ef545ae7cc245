"""Measurements of a living engine: speed, memory, kernels. `smol bench train` is the door."""
