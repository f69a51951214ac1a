"""Failures by type. One more kind, a job too large for the memory, has torch's own errors."""

import traceback


class RequestError(Exception):
    """The caller's mistake. The message tells the caller what to change; the worker is unharmed."""


class OpenAIRequestError(RequestError):
    """The same, of a call of OpenAI's API, whose answer says whose mistake it is."""


class ToldToEndError(RequestError):
    """Not the caller's mistake: the worker ends before what the job waits for is there. The message
    tells the caller to send the job again."""


class ModelError(Exception):
    """The models cannot be loaded as configured. The worker must stop: no job can succeed.

    Of what only some jobs need, the message begins with the setting, and is `at` the field of the
    job that asks for it.
    """

    def at(self, field: str) -> str:
        """The message for a caller, who knows no settings."""
        _, _, what = str(self).partition(": ")
        return f"{field}: {what}"


class BrokenFilesError(ModelError):
    """Files of the owner are not what they should be. The message has paths and the words of
    libraries in it, which are for the owner alone."""


class PictureError(Exception):
    """The models gave no picture, twice. The message is for the caller; the worker is unharmed."""


def let_go(error: BaseException) -> None:
    """Free what the frames of an error's traceback hold: after an out-of-memory error, the tensors
    of the failed pass, which otherwise stay as long as the error is kept.

    Call it in the thread that failed, before the error reaches a coroutine: clearing the frame of
    a waiting coroutine would end the coroutine.
    """
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        one = chain.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            chain += [one.__cause__, one.__context__]
