"""Actions to token ids of a vocabulary and back, as OpenVLA does it.

python -m examples.tokenize_actions
"""

import numpy as np

from vla.tokenizers.chunk_codec import ActionCodec
from vla.tokenizers.placement import Placement
from vla.tokenizers.uniform import UniformTokenizer


def main() -> None:
    # Llama-2 has 32000 tokens; OpenVLA's model pads its embedding to 32064 rows.
    placement = Placement.tail(32000, 256, model_vocab_size=32064)
    codec = ActionCodec(UniformTokenizer(), placement, horizon=2, dim=3)
    actions = np.array([[[-1.0, 0.0, 1.0], [0.25, -0.25, 0.5]]])  # (B, H, D), normalised
    ids = codec.encode(actions)
    decoded, ok = codec.decode(ids)
    print("ids", ids.tolist())
    print("decoded", decoded.round(4).tolist(), "ok", ok.tolist())
    print("largest error", np.abs(decoded - actions).max(), "= at most half a bin,", 1 / 255)
    ids[0, 0] = 17  # not an action id: reported, never turned into some action
    print("with a wrong id", codec.decode(ids))


if __name__ == "__main__":
    main()
