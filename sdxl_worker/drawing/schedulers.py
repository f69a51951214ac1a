"""What carries out a sampler and a schedule: a scheduler of diffusers, mended where it needs it."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from diffusers.schedulers import AysSchedules

from sdxl_worker.errors import RequestError
from sdxl_worker.few_step import FewStep
from sdxl_worker.request import Request
from sdxl_worker.samplers import EDM_SAMPLERS, SAMPLERS, Sampler, SamplerName, ScheduleName, is_edm
from sdxl_worker.speed.no_waits import host_noise, keep_tables_on_host

# In the configuration.
BY_SIGMAS: Mapping[ScheduleName, str] = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
# They have no `timestep_spacing`, or do not look at it.
CONSISTENCY_CLASSES = ("LCMScheduler", "TCDScheduler")
DEAF_TO_SPACING = ("DPMSolverSinglestepScheduler", *CONSISTENCY_CLASSES)
# How much of the noise is drawn anew in each step, as its authors have it.
TCD_ETA = 0.3


def build_scheduler(
    name: SamplerName,
    config: Mapping[str, Any],
    *,
    begins_in_mid_schedule: bool,
    schedule: ScheduleName | None = None,
    few_step: FewStep | None = None,
    denoising_end: float | None = None,
) -> Any:
    """A new scheduler for one stage of one job.

    It is made from the configuration as it was loaded, never from that of a scheduler that ran:
    what one job sets would stay for the next, and some classes change their own configuration.

    Args:
        name: as `check_sampler` lets it pass, like `schedule`.
        begins_in_mid_schedule: whether its first step is not the first one of its schedule.
        schedule: None: "normal".
        few_step: the model's settings, if it is such a one.
        denoising_end: the share of the schedule at which the stage ends, if not at its end.
    """
    schedule = schedule or "normal"
    if is_edm(config):
        return _edm_scheduler(EDM_SAMPLERS[name], config, schedule)
    sampler = SAMPLERS[name]
    changes: dict[str, Any] = dict(sampler.config)
    if schedule != "normal":
        changes |= dict.fromkeys(BY_SIGMAS.values(), False)
    if schedule == "trailing":
        changes["timestep_spacing"] = "trailing"
    elif schedule in BY_SIGMAS:
        # Some classes take the largest and the smallest sigma from the timesteps: this has all.
        changes |= {BY_SIGMAS[schedule]: True, "timestep_spacing": "linspace"}
    if few_step is not None and few_step.scheduler == name:
        changes |= few_step.config
    scheduler = _make(sampler, schedule, {**config, **changes})
    timesteps_of = _timesteps_of(sampler, schedule, scheduler)
    if timesteps_of is not None:
        _space(scheduler, timesteps_of)
    if few_step is not None and few_step.scheduler == name and few_step.timesteps is not None:
        _space(scheduler, functools.partial(_where_as_many, few_step.timesteps))
    _stay_within_training(scheduler)
    if sampler.class_name == "TCDScheduler":
        eta = few_step.eta if few_step is not None and few_step.eta is not None else TCD_ETA
        _step_with(scheduler, eta=eta)
    if denoising_end is not None and sampler.calls_per_step == 2:
        _end_after_whole_steps(scheduler, denoising_end)
    if hasattr(scheduler, "sigmas_interpol"):
        _add_noise_of_midpoints(scheduler)
    if begins_in_mid_schedule and name in BEGIN_IN_MID_SCHEDULE:
        BEGIN_IN_MID_SCHEDULE[name](scheduler)
    return scheduler


def _make(sampler: Sampler, schedule: ScheduleName, config: Mapping[str, Any]) -> Any:
    scheduler_class = _load_class(sampler, schedule)
    # diffusers would log the others, which are for other classes, each time.
    taken = inspect.signature(scheduler_class.__init__).parameters
    known = {key: value for key, value in config.items() if key in taken or key.startswith("_")}
    scheduler = scheduler_class.from_config(known)
    keep_tables_on_host(scheduler)
    return scheduler


def _load_class(sampler: Sampler, schedule: ScheduleName) -> Any:
    module = importlib.import_module(f"diffusers.schedulers.{sampler.module}")
    # The modules lack scipy if `sparing_imports` hid it.
    if sampler.class_name == "LMSDiscreteScheduler":
        vars(module)["integrate"] = importlib.import_module("scipy.integrate")
    if schedule == "beta":
        importlib.import_module("scipy.stats")
        vars(module)["scipy"] = importlib.import_module("scipy")
        vars(module)["is_scipy_available"] = lambda: True
    if sampler.adds_noise:
        vars(module)["randn_tensor"] = host_noise
    return getattr(module, sampler.class_name)


def _edm_scheduler(sampler: Sampler, config: Mapping[str, Any], schedule: ScheduleName) -> Any:
    """For a model that was trained with continuous noise levels (https://arxiv.org/abs/2206.00364).
    It has sigmas only: no betas, and no timesteps of a training to stay within.
    """
    changes = {} if schedule == "normal" else {"sigma_schedule": schedule}
    return _make(sampler, schedule, {**config, **changes})


def check_sampler(request: Request, config: Mapping[str, Any]) -> None:
    """
    Args:
        request: with the settings of the model's, where it does not name its own.
        config: of the model's scheduler.

    Raises:
        RequestError: the model, or the sampler, cannot do what the request asks for.
    """
    name, schedule = request.scheduler, request.schedule or "normal"
    samplers: Mapping[SamplerName, Sampler] = EDM_SAMPLERS if is_edm(config) else SAMPLERS
    if name not in samplers:
        raise RequestError(
            f"scheduler: {name} cannot do this model, which was trained with continuous noise "
            f"levels (EDM); send {_listed(samplers)}"
        )
    if config.get("rescale_betas_zero_snr") and not samplers[name].zero_terminal_snr:
        able = [one for one, sampler in samplers.items() if sampler.zero_terminal_snr]
        raise RequestError(
            f"scheduler: {name} cannot begin at pure noise, for which this model was trained; send "
            + _listed(able)
        )
    if schedule not in samplers[name].schedules:
        raise RequestError(
            f"schedule: {name} cannot do {schedule}; it does {_listed(samplers[name].schedules)}"
        )
    has_other_noise = is_edm(config) or config.get("rescale_betas_zero_snr")
    if has_other_noise and 0 < (request.high_noise_frac or 0) < 1:
        raise RequestError(
            "high_noise_frac: this model was trained with other noise levels than the refiner, "
            "which cannot go on with what it leaves; leave it out"
        )


def _listed(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def timesteps_run(scheduler: Any, options: Mapping[str, Any]) -> int:
    """How many timesteps the pipelines run: the calls of the UNet.

    Args:
        scheduler: a new one, which is spaced by this.
        options: of a stage.
    """
    steps, end = options["num_inference_steps"], options.get("denoising_end")
    scheduler.set_timesteps(steps, device="cpu")
    timesteps = scheduler.timesteps
    if "strength" in options or "denoising_start" in options:
        pipeline: Any = SimpleNamespace(scheduler=scheduler)
        timesteps, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(
            pipeline, steps, options.get("strength", 1), "cpu", options.get("denoising_start")
        )
    return len(timesteps) if end is None else int((timesteps >= _cutoff(scheduler, end)).sum())


def timesteps_cut_off(pipeline: Any) -> int:
    """How many timesteps of its schedule a pipeline leaves to the next one (`denoising_end`)."""
    scheduler, end = pipeline.scheduler, pipeline.denoising_end
    if end is None:
        return 0
    left = getattr(scheduler, "left_to_the_next", 0)
    return left + int((scheduler.timesteps < _cutoff(scheduler, end)).sum())


def _cutoff(scheduler: Any, share: float) -> int:
    """The timestep at which diffusers' pipelines end one part of a schedule and begin the next."""
    trained = scheduler.config.num_train_timesteps
    return round(trained - share * trained)


TimestepsOf = Callable[[int], Sequence[int] | None]


def _timesteps_of(sampler: Sampler, schedule: ScheduleName, scheduler: Any) -> TimestepsOf | None:
    """For what a class does not do by itself: the timesteps of so many steps, or None: its own."""
    trained = scheduler.config.num_train_timesteps
    if schedule == "ays":
        return functools.partial(align_your_steps, scheduler.alphas_cumprod.numpy())
    if sampler.class_name not in DEAF_TO_SPACING:
        return None
    if schedule == "trailing":
        return functools.partial(trailing, trained)
    if sampler.class_name in CONSISTENCY_CLASSES:
        return functools.partial(_beyond, scheduler.config.original_inference_steps, trained)
    return None


def trailing(trained: int, steps: int) -> list[int]:
    """Evenly spaced timesteps that begin with the last one of the training: "trailing" in table 2
    of https://arxiv.org/abs/2305.08891, rounded as diffusers does it."""
    return (np.arange(trained, 0, -trained / steps).round() - 1).astype(int).tolist()


def align_your_steps(alphas_cumprod: np.ndarray, steps: int) -> list[int]:
    """Timesteps of https://arxiv.org/abs/2404.14507 for SDXL, in any number: between its authors'
    ten, as they do it, log-linearly in sigma. No two are equal: solvers divide by the difference.
    """
    log_sigmas = np.log((1 - alphas_cumprod) / alphas_cumprod) / 2
    of_authors = log_sigmas[[*AysSchedules["StableDiffusionXLTimesteps"], 0]]
    places = np.linspace(0, len(of_authors) - 1, steps + 1)[:-1]
    wanted = np.interp(places, np.arange(len(of_authors)), of_authors)
    rising = np.interp(wanted[::-1], log_sigmas, np.arange(len(log_sigmas))).round()
    count = np.arange(steps)
    apart = np.maximum.accumulate(rising - count) + count
    within = np.minimum(apart, len(log_sigmas) - steps + count)
    return within[::-1].astype(int).tolist()


def _beyond(original_steps: int, trained: int, steps: int) -> list[int] | None:
    """LCM and TCD pick their timesteps from those of their training, 50, and refuse more."""
    return trailing(trained, steps) if steps > original_steps else None


def _where_as_many(timesteps: Sequence[int], steps: int) -> Sequence[int] | None:
    return timesteps if len(timesteps) == steps else None


def _space(scheduler: Any, timesteps_of: TimestepsOf) -> None:
    """Where a schedule is asked for by its number of steps, as the pipelines do."""
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def spaced(num_inference_steps: int | None = None, *args: Any, **options: Any) -> None:
        timesteps = None if num_inference_steps is None else timesteps_of(num_inference_steps)
        if timesteps is None:
            set_timesteps(num_inference_steps, *args, **options)
            return
        if type(scheduler).__name__ in CONSISTENCY_CLASSES:
            # Otherwise they warn of timesteps that they would not pick.
            options["original_inference_steps"] = scheduler.config.num_train_timesteps
        set_timesteps(None, *args, timesteps=list(timesteps), **options)

    scheduler.set_timesteps = spaced


def _step_with(scheduler: Any, **given: Any) -> None:
    """The pipelines pass an eta of 0."""
    step = scheduler.step

    @functools.wraps(step)
    def step_with(*args: Any, **options: Any) -> Any:
        return step(*args, **{**options, **given})

    scheduler.step = step_with


def _end_after_whole_steps(scheduler: Any, denoising_end: float) -> None:
    """Two calls make a step. The pipeline that goes on begins with a whole one; this one would end
    after half of it, with latents that were moved already.
    """
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def whole(*args: Any, **options: Any) -> None:
        set_timesteps(*args, **options)
        left = int((scheduler.timesteps < _cutoff(scheduler, denoising_end)).sum())
        left += left % 2 == 0  # the last step takes one
        scheduler.timesteps = scheduler.timesteps[: len(scheduler.timesteps) - left]
        scheduler.left_to_the_next = left

    scheduler.set_timesteps = whole


def _add_noise_of_midpoints(scheduler: Any) -> None:
    """After its first call, a step of DPM-2 is halfway, and so is the noise of its latents: to add
    as much to what a mask keeps, diffusers would take that of the step's end.
    """
    add_noise = scheduler.add_noise

    @functools.wraps(add_noise)
    def with_midpoints(original: torch.Tensor, noise: torch.Tensor, *timesteps: Any) -> Any:
        if scheduler.step_index is None or scheduler.state_in_first_order:
            return add_noise(original, noise, *timesteps)
        place = scheduler.step_index - hasattr(scheduler, "sigmas_up")  # the ancestral one's
        return original + noise * scheduler.sigmas_interpol[place]

    scheduler.add_noise = with_midpoints


def _stay_within_training(scheduler: Any) -> None:
    """With "leading" spacing, SDXL's, a schedule of some 1000 steps begins beyond the last timestep
    that the model was trained with, or comes out as one timestep over and over: diffusers then
    looks outside its tables, or divides by zero. One step with "linspace" spacing begins at its
    end, where there is no noise, and one of a schedule by sigmas may be no step at all. With
    "trailing" spacing 1 step and 1000 steps fit.
    """
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def within_training(*args: Any, **options: Any) -> None:
        set_timesteps(*args, **options)
        timesteps = scheduler.timesteps
        by_sigmas = any(scheduler.config.get(flag) for flag in BY_SIGMAS.values())
        least = max(len(timesteps) // scheduler.order - 1, 1)
        fits = least <= timesteps[0] < scheduler.config.num_train_timesteps
        if not fits or (by_sigmas and len(timesteps) == 1):
            no_sigmas = dict.fromkeys(BY_SIGMAS.values(), False) if len(timesteps) == 1 else {}
            scheduler.register_to_config(timestep_spacing="trailing", **no_sigmas)
            set_timesteps(*args, **options)

    scheduler.set_timesteps = within_training


def _take_the_order_that_is_held(scheduler: Any) -> None:
    """A linear multistep method of order n weighs the derivatives of the last n steps.

    diffusers takes the order from the place in the schedule: four in the middle, even if the first
    step is there. Without the other derivatives the weights do not add up to the step.
    """
    step = scheduler.step

    @functools.wraps(step)
    def step_with_order(*args: Any, **options: Any) -> Any:
        return step(*args, **options, order=min(len(scheduler.derivatives) + 1, LMS_ORDER))

    scheduler.step = step_with_order


def _begin_without_repeating(scheduler: Any) -> None:
    """PNDM makes up for the history it lacks by doing its first step twice, at a repeated
    timestep. Only a whole schedule repeats it; in a part of one, diffusers takes the second step
    for the repetition, and all later steps then expect less noise than there is.

    So begin with order one, as the other multistep schedulers do, and raise it with each step.
    """
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    # Runge-Kutta steps, which some configurations begin with, repeat timesteps as well.
    scheduler.register_to_config(skip_prk_steps=True)

    @functools.wraps(set_timesteps)
    def without_repetition(*args: Any, **options: Any) -> None:
        set_timesteps(*args, **options)
        scheduler.timesteps = torch.unique_consecutive(scheduler.timesteps)

    @functools.wraps(step)
    def step_once(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        scheduler.counter = max(scheduler.counter, 2)  # 1 is for the repetition
        return result

    scheduler.set_timesteps, scheduler.step = without_repetition, step_once


LMS_ORDER = 4
BEGIN_IN_MID_SCHEDULE: Mapping[SamplerName, Callable[[Any], None]] = {
    "PNDM": _begin_without_repeating,
    "KLMS": _take_the_order_that_is_held,
}
