"""The three kinds of failure, told apart by type."""


class RequestError(Exception):
    """The caller's mistake. The message tells the caller what to change; the worker is unharmed."""


class ModelError(Exception):
    """The models cannot be loaded as configured. The worker must stop: no job can succeed."""


class PassingFault(Exception):
    """This job failed for want of memory; the worker is well, and a smaller job will pass."""
