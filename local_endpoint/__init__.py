"""A stand-in for a Runpod Serverless endpoint, for development and tests.

The worker never imports this package; production runs on Runpod itself.
"""

from local_endpoint.faults import JUNK_JOBS, PASSING, Fault, Faults
from local_endpoint.local import LocalEndpoint
from local_endpoint.queue import Receipt, Rules, Status
from local_endpoint.record import Record
from local_endpoint.workers import EndpointError, Worker

__all__ = [
    "JUNK_JOBS",
    "PASSING",
    "EndpointError",
    "Fault",
    "Faults",
    "LocalEndpoint",
    "Receipt",
    "Record",
    "Rules",
    "Status",
    "Worker",
]
