"""What the server answers when it cannot answer with an action.

    400  the request is wrong (got / expected / fix say how)      401  no or wrong API key
    404, 405  no such path or method                              413  body too large
    500  the policy failed; `id` finds the traceback in the log   503  too many requests waiting, try again
    502  the model's output was not an action (`undecodable`)

502 and not 500, because server and policy worked: the model behind them gave an invalid answer, and the next query may
well be fine. It is never 200: `/act` has no field to say "do not execute this", and a made-up action moves a robot.
"""

from __future__ import annotations

import re
from typing import Any

from vla.types import VlaError

PARTS = re.compile(r"got (?P<got>.*); expected (?P<expected>.*); fix: (?P<fix>.*)", re.DOTALL)


class RequestError(VlaError):
    """An HTTP error with the house's three parts."""

    def __init__(self, status: int, got: str, expected: str, fix: str, **extra: Any) -> None:
        super().__init__(f"got {got}; expected {expected}; fix: {fix}")
        self.status = status
        self.body: dict[str, Any] = {"error": {"got": got, "expected": expected, "fix": fix, **extra}}


def as_request_error(error: VlaError) -> RequestError:
    """Any `VlaError` as a 400, its text taken apart again."""
    if isinstance(error, RequestError):
        return error
    parts = PARTS.fullmatch(str(error))
    if parts is None:
        return RequestError(400, str(error), "a request this policy can answer", "see GET /metadata")
    return RequestError(400, parts["got"], parts["expected"], parts["fix"])


def undecodable(detail: str = "output that does not decode to an action") -> RequestError:
    """The 502 for an answer with `ok=False`."""
    return RequestError(502, detail, "one legal action token per dimension", "do not move; query again, or stop",
                        undecodable=True)  # fmt: skip
