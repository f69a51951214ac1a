"""The worker, in rooms that a job passes in this order: request, inputs, loading (what is loaded
already), drawing (with what speed gives), outputs. `serving` leads it through them.

What lies beside the rooms is below them all. A room imports only rooms further down:
serving, outputs, drawing, loading, speed, inputs.
"""

__version__ = "3.0.0"
