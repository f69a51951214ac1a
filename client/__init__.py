"""What people use: the command `sdxl` and the page.

They know the HTTP interface and the JSON Schema of a request's input, and nothing of the worker:
`pip install .` gives the command without torch.
"""
