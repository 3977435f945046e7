"""An endpoint as a `Policy`, so that evaluation and RL never know they drive a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla.serve.client import PolicyClient, PolicyServerError
from vla.types import ActionChunk, Observation, VlaError, problem


class RemotePolicy:
    """A `Policy` whose model runs behind `url`. Everything but `Observation.privileged` is sent.

    Args:
        timeout_s: per query; the first one after start may be slow.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 60.0, retries: int = 3) -> None:
        try:
            self._client = PolicyClient(url, api_key, timeout_s, retries)
            self._metadata = self._client.metadata
        except PolicyServerError as error:
            raise VlaError(str(error)) from error
        except ValueError as error:
            raise problem(f"url {url!r}", "http://host:port", "correct the url") from error

    @property
    def metadata(self) -> dict[str, Any]:
        return self._metadata

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """VlaError with the server's got / expected / fix if it refuses or does not answer.

        Output that the server could not decode is no error here: that chunk has `ok=False` and NaN actions.
        """
        try:
            chunks = self._client.act(observations)
        except PolicyServerError as error:
            raise VlaError(str(error)) from error
        return [
            ActionChunk(np.asarray(chunk.actions), chunk.token_ids, chunk.logprobs, chunk.ok, chunk.motion)
            for chunk in chunks
        ]

    def reset(self) -> None:
        self._client.reset()

    def close(self) -> None:
        self._client.close()
