"""The typed JSON of `POST /v1/act`; FastAPI publishes it under /docs and /openapi.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt

from vla.types import ActionChunk


class ArrayBody(BaseModel):
    """A numpy array as the package json_numpy writes it."""

    model_config = ConfigDict(extra="forbid")
    data: str = Field(alias="__numpy__", description="base64 of the C-order bytes")
    dtype: str = Field(examples=["|u1", "<f4"])
    shape: list[StrictInt]


class ObservationBody(BaseModel):
    """What the robot sees and is told."""

    model_config = ConfigDict(extra="forbid")
    images: dict[str, ArrayBody | str] = Field(
        description="camera name -> uint8 RGB (height, width, 3) in json_numpy's form, or a base64 PNG or JPEG file"
    )
    instruction: str = Field(examples=["pick up the red cup"])
    state: ArrayBody | list[StrictFloat] | None = Field(None, description="proprioceptive state, un-normalised")
    key: list[StrictInt] = Field([], description="identity of this query; a sampling policy draws its noise from it")
    past_actions: ArrayBody | list[list[StrictFloat]] | None = Field(
        None,
        description="actions executed in this episode, oldest first, the last `history` of /metadata; [] at its start",
    )
    motion: str | None = Field(
        None, description="language motion to act by, where /metadata lists `motions`; left out: the policy chooses"
    )


class ActRequest(BaseModel):
    """One observation (`images`, `instruction`, ...), or several under `observations`."""

    model_config = ConfigDict(extra="forbid")
    observations: list[ObservationBody] | None = Field(None, min_length=1)
    images: dict[str, ArrayBody | str] | None = None
    instruction: str | None = None
    state: ArrayBody | list[StrictFloat] | None = None
    key: list[StrictInt] | None = None
    past_actions: ArrayBody | list[list[StrictFloat]] | None = None
    motion: str | None = None
    unnorm_key: str | None = Field(None, description="must be the statistics the server was started with")


class ActResult(BaseModel):
    """The answer to one observation."""

    ok: bool = Field(description="false: the model's output was not an action; do not move")
    actions: list[list[float]] | None = Field(description="(H, D), un-normalised; null if not ok")
    shape: list[int] = Field(description="[H, D]")
    token_ids: list[int] | None = None
    logprobs: list[float | None] | None = Field(None, description="one per token; null where not finite")
    motion: str = Field("", description="the language motion that the actions follow; empty for a policy without")


class ActReply(ActResult):
    """The answer to a single observation."""

    latency_ms: float = Field(description="time inside the server, waiting included")


class BatchReply(BaseModel):
    """The answers to `observations`, in order."""

    results: list[ActResult]
    latency_ms: float


def result_json(chunk: ActionChunk) -> dict[str, Any]:
    """An `ActResult` as plain values; a chunk that is not ok, or not finite, has no actions."""
    ok = is_usable(chunk)
    ids, logprobs = chunk.token_ids, chunk.logprobs
    return {
        "ok": ok,
        "actions": chunk.actions.tolist() if ok else None,
        "shape": list(chunk.actions.shape),
        "token_ids": None if ids is None else np.asarray(ids).tolist(),
        "logprobs": None if logprobs is None else [_finite(value) for value in np.asarray(logprobs).tolist()],
        "motion": chunk.motion,
    }


def is_usable(chunk: ActionChunk) -> bool:
    """Whether a robot may execute it."""
    return chunk.ok and bool(np.isfinite(chunk.actions).all())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
