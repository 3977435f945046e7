"""How a policy with a head (`vla.spec.HeadSpec`) is asked: model inputs with several images and the state as a token, and
answers from one pass.

An L1 head answers with actions alone: its chunks have no token ids and no log-probabilities, so there is nothing to sample
from and nothing that reinforcement learning could use. The discrete head has both; the log-probability of a token does not
depend on the tokens beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from vla.backbone import Backbone
from vla.decoding import gumbel_noise
from vla.normalize import Statistics, state_normalizer
from vla.spec import PolicySpec
from vla.token_rows import only_rows
from vla.tokenizers.chunk_codec import ActionCodec
from vla.types import Observation, problem


def check_head(spec: PolicySpec, backbone: Backbone, codec: ActionCodec, temperature: float) -> None:
    """VlaError for a head that this backbone, these tokens or sampling do not go with."""
    from vla.openvla.oft_model import inner

    inner(backbone.model)
    assert spec.head is not None
    if spec.head.kind == "l1" and temperature > 0:
        raise problem(f"temperature {temperature} with an L1 head", "0: it answers with one chunk, not with a distribution",
                      "leave out the temperature")  # fmt: skip
    if spec.prompt.numbers_as == "tokens" or spec.motion is not None:
        raise problem("parallel decoding with number tokens in the prompt or language motions", "a prompt of words, and actions "
                      "alone", "use --numbers-as text without --language-motion, or --head tokens")  # fmt: skip
    if spec.head.kind == "discrete" and not (codec.per_dimension and codec.grammar.free):
        raise problem(f"scheme {spec.tokens.scheme!r} with parallel decoding", "one token per dimension, each legal everywhere: "
                      "all are said at once", "use --tokenizer uniform or quantile, or --head tokens")  # fmt: skip


def normalized_states(
    spec: PolicySpec, statistics: Statistics, observations: Sequence[Observation], keys: Sequence[str]
) -> np.ndarray | None:
    """float32 (B, S) in [-1, 1], each by the statistics of its dataset; None for a head that sees no state.

    Raises:
        VlaError: an observation without a state, of another length, or with numbers that are not finite.
    """
    assert spec.head is not None
    names = spec.head.state_names
    if not names:
        return None
    rows = []
    for observation, key in zip(observations, keys, strict=True):
        state = observation.state
        if state is None or state.shape != (len(names),):
            got = "no state" if state is None else f"a state of shape {state.shape}"
            raise problem(got, f"({len(names)},): {', '.join(names)}", "send the robot's state")
        if not np.isfinite(state).all():
            raise problem(f"state {state.tolist()}", "finite numbers", "check the sensor or the dataset")
        rows.append(state_normalizer(statistics, key, len(names), spec.action.normalization).normalize(state))
    return np.stack(rows)


def encode(
    backbone: Backbone, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], states: np.ndarray | None
) -> dict[str, torch.Tensor]:
    """Model inputs of B prompts with C images each: as `Backbone.encode`, the images stacked along the channels, and
    float32 `proprio` (B, S) where there are states."""
    inputs = backbone.processor.encode_many(prompts, images, n_more=0 if states is None else 1)
    dtype = backbone.model.dtype
    found = {name: x.to(backbone.device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}
    return found if states is None else {**found, "proprio": torch.from_numpy(states).to(backbone.device)}


@torch.no_grad()
def answer(
    backbone: Backbone, codec: ActionCodec, kind: str, inputs: dict[str, torch.Tensor], temperature: float = 0.0,
    keys: Sequence[tuple[int, ...]] = (),
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:  # fmt: skip
    """(float32 normalised actions (B, H, D), int64 ids (B, H * D) and their float32 log-probabilities over the legal ids;
    None and None with an L1 head)."""
    n_actions, model = codec.horizon * codec.dim, backbone.model
    if kind == "l1":
        return model(**inputs, n_actions=n_actions).float().cpu().numpy(), None, None
    legal = torch.from_numpy(np.array(codec.legal_ids)).to(backbone.device)
    with only_rows(model, legal):
        logits = model(**inputs, n_actions=n_actions).float()  # (B, T, n_symbols)
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    noise = _noise(keys, logprobs) if temperature > 0 else 0.0
    chosen = (logprobs + noise).argmax(-1)
    ids, scores = legal[chosen].cpu().numpy(), logprobs.gather(-1, chosen[..., None])[..., 0].cpu().numpy()
    return codec.decode(ids)[0], ids, scores


def _noise(keys: Sequence[tuple[int, ...]], like: torch.Tensor) -> torch.Tensor:
    """(B, T, n_symbols), place after place, as sampling one token after the other draws it."""
    if len(keys) != len(like) or not all(keys):
        raise ValueError("sampling needs one non-empty key per row")
    steps = gumbel_noise(keys, like.shape[2])
    return torch.stack([next(steps) for _ in range(like.shape[1])], dim=1).to(like.device)
