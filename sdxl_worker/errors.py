"""Failures told apart by type. The third kind, a job too large for the memory, is torch's own."""


class RequestError(Exception):
    """The caller's mistake. The message tells the caller what to change; the worker is unharmed."""


class ModelError(Exception):
    """The models cannot be loaded as configured. The worker must stop: no job can succeed."""
