"""What the worker's owner allows of what a request may ask for."""

from sdxl_worker.errors import RequestError
from sdxl_worker.request import CHECK_INPUT, Request
from sdxl_worker.settings import Settings


def check_limits(request: Request, settings: Settings) -> None:
    """Hold the steps that a request names to `MAX_STEPS`.

    Only those that it names: a request that leaves a field out asks for nothing that it could take
    back, and the defaults are the worker's own. So are the steps of a check.

    Raises:
        RequestError: with each field over the limit on a line of its own.
    """
    steps: dict[str, int] = {
        name: getattr(request, name)
        for name in ("num_inference_steps", "refiner_inference_steps")
        if name in request.model_fields_set
    }
    if request.hires is not None and request.hires.steps is not None:
        steps["hires.steps"] = request.hires.steps
    problems = [
        f"{name}: must be {settings.max_steps} or less, as this worker's owner has set; got {value}"
        for name, value in steps.items()
        if value > settings.max_steps and not (request.check and value == CHECK_INPUT.get(name))
    ]
    if problems:
        raise RequestError("\n".join(problems))
