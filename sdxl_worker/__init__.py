"""Stable Diffusion XL worker for Runpod Serverless.

One module per stage of a job, in the order in which a job passes them:
request -> inputs -> models -> generate (prompts, schedulers) -> outputs.
"""

__version__ = "3.0.0"
