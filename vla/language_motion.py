"""Language motions: a phrase such as "move arm forward and left, close gripper" between instruction and actions (RT-H,
Belkhale et al., arXiv 2403.01823).

A policy with language motions is asked twice. The motion query (images, instruction) is answered with one of the policy's
phrases, the action query (images, instruction, phrase) with the actions. Both go to the same weights. The phrase is chosen
greedily, token by token, among the known ones; noise and temperature are those of the actions alone, and so are
`ActionChunk.logprobs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from vla.backbone import Backbone
from vla.motion_spec import MotionSpec, check_said
from vla.spec import PolicySpec, PromptSpec
from vla.tokenizers.grammar import IdGrammar
from vla.tokenizers.placement import Placement
from vla.types import Observation, VlaError, problem


def asked(observation: Observation, spec: PolicySpec) -> tuple[Observation, PromptSpec]:
    """The observation and prompt of the query that is due: the action query of an observation that carries a motion, the
    motion query of one that does not. Without language motions, both as they are.

    Raises:
        VlaError: a motion for a policy without language motions.
    """
    if spec.motion is None:
        if observation.motion:
            raise problem(f"motion {observation.motion!r} for a policy without language motions", "none",
                          "leave it out, or train a policy with `vla finetune --language-motion`")  # fmt: skip
        return observation, spec.prompt
    if not observation.motion:
        return observation, dataclasses.replace(spec.prompt, template=spec.motion.template)
    instruction = observation.instruction.strip().rstrip(".")
    text = spec.motion.joined.format(instruction=instruction, motion=observation.motion) if instruction else ""
    return dataclasses.replace(observation, instruction=text), spec.prompt


def motion_query(observation: Observation) -> Observation:
    """The observation without its motion: what a policy with language motions is asked a motion for."""
    return dataclasses.replace(observation, motion="") if observation.motion else observation


def with_motions(
    observations: Sequence[Observation], choose: Callable[[list[Observation]], list[str]]
) -> list[Observation]:
    """Each observation with the motion to act by: the one it carries, e.g. a person's correction, else what `choose` says.

    Raises:
        VlaError: a motion that is not one line of text.
    """
    for observation in observations:
        if observation.motion:
            check_said(observation.motion)
    open_ = [observation for observation in observations if not observation.motion]
    chosen = iter(choose(open_) if open_ else [])
    return [o if o.motion else dataclasses.replace(o, motion=next(chosen)) for o in observations]


def choose_phrases(backbone: Backbone, inputs: dict[str, torch.Tensor], grammar: IdGrammar) -> list[str]:
    """The answer to each of B motion queries; `grammar` is `phrase_grammar`'s. Rows are independent."""
    trie = grammar.grammar
    assert isinstance(trie, PhraseTrie)
    ids = backbone.sample(inputs, grammar)[0].cpu().numpy()  # (B, T)
    return [trie.phrase_of(np.searchsorted(grammar.ids, row[row >= 0]).tolist()) for row in ids]


def phrase_ids(backbone: Backbone, phrase: str) -> list[int]:
    """What the model says for a phrase: its ids and the end of text."""
    words = backbone.processor.tokenizer
    return [*words.encode(phrase, add_special_tokens=False), words.eos_token_id]


def phrase_grammar(backbone: Backbone, motion: MotionSpec) -> IdGrammar:
    """The rows of ids that say one of the phrases."""
    rows = [phrase_ids(backbone, phrase) for phrase in motion.phrases]
    ids = sorted({id_ for row in rows for id_ in row})
    column = {id_: k for k, id_ in enumerate(ids)}
    trie = PhraseTrie([[column[id_] for id_ in row] for row in rows], motion.phrases)
    return IdGrammar(trie, Placement.reserved(ids, model_vocab_size=backbone.n_embeddings))


class PhraseTrie:
    """A `Grammar` of a given set of rows. A state is a node; symbol k is the k-th of the ids that occur, ascending.

    Raises:
        VlaError: two phrases that the model's tokenizer makes the same row of.
    """

    start = 0

    def __init__(self, rows: Sequence[Sequence[int]], phrases: Sequence[str]) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._phrase: dict[int, str] = {}
        self.max_tokens = max(len(row) for row in rows)
        for row, phrase in zip(rows, phrases, strict=True):
            node = 0
            for symbol in row:
                if symbol not in self._next[node]:
                    self._next[node][symbol] = len(self._next)
                    self._next.append({})
                node = self._next[node][symbol]
            if node in self._phrase:
                raise VlaError(f"got the motions {self._phrase[node]!r} and {phrase!r}, which are the same tokens of this "
                               "backbone; expected phrases it can tell apart; fix: choose other --motion-words")  # fmt: skip
            self._phrase[node] = phrase

    def legal(self, state: int) -> np.ndarray:
        return np.array(sorted(self._next[state]), np.int64)

    def advance(self, state: int, symbol: int) -> int:
        return self._next[state][symbol]

    def phrase_of(self, symbols: Sequence[int]) -> str:
        """The phrase that a complete row says."""
        node = self.start
        for symbol in symbols:
            node = self.advance(node, symbol)
        return self._phrase[node]
