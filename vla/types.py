"""The types that pass between the parts. Every dtype, shape, range and convention is written here and nowhere else.

Letters used in shapes throughout the project:

    B batch   G rollouts per group   T tokens   H chunk horizon   D action dimensions   S state dimensions
    V vocabulary   C cameras   Q policy queries in one episode

Conventions:

- images are uint8 RGB, (height, width, 3), as the suite's camera spec says (upright unless it says otherwise);
- states and actions are float32, physical units as the suite names them;
- the gripper's sign and whether an action is a delta are properties of a policy's `ActionSpec`, never assumed;
- success is latched: an episode is a success if any of its steps was one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one query."""

    images: dict[str, np.ndarray]
    """Camera name -> uint8 (height, width, 3) RGB. Empty if the frame was not drawn."""
    state: np.ndarray | None
    """float32 (S,) proprioceptive state, un-normalised; None if the robot has none."""
    instruction: str
    key: tuple[int, ...] = ()
    """Identity of this query, e.g. (seed, episode, query). A sampling policy draws its noise from it, so results do not
    depend on batch order, worker count or restarts. Empty: the policy must be greedy."""
    privileged: np.ndarray | None = None
    """Simulator state for scripted experts. Never shown to a learned policy, never written to a dataset."""
    past_actions: np.ndarray | None = None
    """float32 (n, D): the last n actions executed in this episode, oldest first, as the robot was given them: in the units
    and with the gripper's signs of `ActionChunk.actions`. A policy whose metadata say `history` K reads the last K; fewer
    mean that the episode is younger than that, (0, D) that it begins. None: not known. A recorded action is turned into
    what the robot is given (`LocalPolicy.to_robot`) before it is shown, so training and acting show the same."""
    motion: str = ""
    """Language motion to act by, e.g. "move arm forward": a person's correction. Empty: the policy chooses one, if it has
    them (`vla.language_motion`)."""


@dataclass(frozen=True)
class ActionChunk:
    """What a policy answers to one observation."""

    actions: np.ndarray
    """float32 (H, D), un-normalised."""
    token_ids: np.ndarray | None = None
    """int64 (T,) model vocabulary ids, T = H*D for one token per dimension; None for policies without tokens."""
    logprobs: np.ndarray | None = None
    """float32 (T,) log-probability of each token over the legal action ids, at the temperature it was drawn with."""
    ok: bool = True
    """False if the model's output could not be decoded; `actions` are then NaN and must not be executed."""
    motion: str = ""
    """The language motion these actions follow, chosen by the policy or given; empty for a policy without."""


@dataclass(frozen=True)
class Step:
    """One control step: what was seen, what was done, what came of it."""

    observation: Observation
    action: np.ndarray
    """float32 (D,), un-normalised, as given to the environment."""
    reward: float = 0.0
    success: bool = False


@dataclass(frozen=True)
class Episode:
    """One attempt at one instruction."""

    steps: Sequence[Step]
    instruction: str
    dataset: str
    """Name under which this data's statistics are kept (the `unnorm_key`)."""
    success: bool | None = None
    """None if the data does not say."""
    seed: int | None = None
    """`Env.reset(seed=...)` that gives the same initial state, when known."""
    task: str | None = None
    initial_state: np.ndarray | None = None
    """Simulator state at the first step, when known."""

    def __len__(self) -> int:
        return len(self.steps)


@runtime_checkable
class Policy(Protocol):
    """Anything that turns observations into action chunks: a local model, an HTTP client, a replay, a scripted expert."""

    @property
    def metadata(self) -> dict[str, Any]:
        """At least `name`, `horizon` (H) and `action_dim` (D); `history` (K) if it is shown past actions."""
        ...

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """One chunk per observation, in order. Rows are independent: batching changes nothing."""
        ...

    def reset(self) -> None:
        """Forget anything remembered from earlier queries."""
        ...


class Env(Protocol):
    """One simulator instance for one task, with Gymnasium's `reset` / `step`."""

    render_frames: bool
    """While False, `reset` and `step` return observations without images: only frames somebody sees are drawn."""

    def reset(self, *, seed: int, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Same seed, same initial state, bit for bit."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, info). `info["success"]` is a bool."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Task:
    """One task of a suite."""

    name: str
    instruction: str
    max_steps: int


class Suite(Protocol):
    """A named set of tasks on one simulator. Must be picklable: worker processes build their environments from it."""

    @property
    def name(self) -> str: ...
    @property
    def tasks(self) -> Sequence[Task]: ...
    @property
    def cameras(self) -> Sequence[str]: ...
    @property
    def image_size_px(self) -> int: ...
    @property
    def control_hz(self) -> float: ...
    @property
    def default_slots(self) -> int:
        """Environments that fit in one simulator process, where the user does not say: a matter of their memory."""
        ...

    @property
    def frames_upside_down(self) -> bool:
        """True if the cameras' frames come bottom row first, as OpenGL draws. Videos and reports turn them over;
        observations are left as they are."""
        ...

    @property
    def action_names(self) -> Sequence[str]: ...
    @property
    def state_names(self) -> Sequence[str]: ...

    def make(self, task: str) -> Env: ...

    def expert(self, task: str) -> Policy:
        """A scripted policy that reads `Observation.privileged`; ValueError if the suite has none for this task."""
        ...

    def versions(self) -> dict[str, str]:
        """Library versions that can change results (simulator, physics)."""
        ...


class VlaError(Exception):
    """A mistake the user can mend. The text says what was got, what was expected and how to fix it.

    The command line prints it without a traceback and exits with code 2.
    """


class ActionDecodeError(VlaError, ValueError):
    """Token ids that do not form an action chunk."""


def problem(got: object, expected: object, fix: str) -> VlaError:
    """A `VlaError` in the house form."""
    return VlaError(f"got {got}; expected {expected}; fix: {fix}")


@dataclass(frozen=True)
class EpisodeRequest:
    """One episode somebody wants: the unit of work of the rollout engine."""

    task: str
    seed: int
    """Seed of `Env.reset`."""
    key: tuple[int, ...] = ()
    """Prefix of each query's `Observation.key`; empty for a greedy policy."""
    tags: dict[str, Any] = field(default_factory=dict)
    """Carried through untouched, e.g. the group an RL rollout belongs to."""


@dataclass(frozen=True)
class Query:
    """One policy call inside an episode."""

    observation: Observation
    chunk: ActionChunk
    n_executed: int
    """How many of the H actions reached the simulator (the step that ended the episode counts)."""
    latency_ms: float = float("nan")


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode."""

    request: EpisodeRequest
    success: bool
    n_steps: int
    queries: Sequence[Query] = ()
    """Empty unless the caller asked to keep them."""
    frames: Sequence[np.ndarray] = ()
    """uint8 (height, C * width, 3), all cameras side by side, as the policy saw them; empty unless asked for."""
    fault: str | None = None
    """Why the simulator failed (crash, hang, NaN); such an episode is neither a success nor a failure."""
    undecodable: int = 0
    """Policy answers with `ok=False`; the episode ends there as a failure."""
    wall_s: float = 0.0
