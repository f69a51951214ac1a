"""The worker. Its folders, called rooms, are layers: a room imports only itself, rooms to its right
in serving, outputs, drawing, loading, speed, inputs, and the modules beside the rooms.

`serving` takes a job through request, inputs, drawing (with the loaded models) and outputs.
"""

__version__ = "3.0.0"
