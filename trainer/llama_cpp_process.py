"""Run as a script by llama_cpp.py: a GGUF file in llama.cpp, which scores rows of tokens.

A process of its own, because a failed assertion in C++ ends the interpreter. It imports nothing of
this package, whose imports take longer than a small model.

Arguments: the file, and the length of the longest row. Input: a JSON object a line, ``ids``, and
``first``, the place of the first one that is scored. Output: for each, a JSON list of nats.
"""

import json
import os
import sys
from typing import Any

import xllamacpp


# More than any difference between two logits.
FORCED = 1e4
# More than any vocabulary has.
VOCABULARY = 2**24


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp talks
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.warmup = int(sys.argv[2]) + 1, 1, False
    if threads := int(os.environ.get("OMP_NUM_THREADS", "0")):  # as PyTorch; its own: all cores
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    scorer = Scorer(xllamacpp.Server(params))
    for line in sys.stdin:
        row = json.loads(line)
        ids = row["ids"]
        nats = [scorer.nats(ids[:i], ids[i]) for i in range(row["first"], len(ids))]
        print(json.dumps(nats), file=answers, flush=True)


class Scorer:
    """Asks llama.cpp how probable a token is after others.

    It tells the log-probability of what it chose, as the model gave it. So the token is forced upon
    it: the bias counts for the choice alone. Of a token that ends the text, or that is a part of a
    character, it tells nothing; then another one is forced, and it tells the whole vocabulary.
    """

    def __init__(self, server: Any) -> None:
        self._server = server
        self._told: int | None = None  # a token that it tells of

    def nats(self, before: list[int], token: int) -> float:
        """The negative log-probability of a token."""
        if found := self._force(token, before, 1):
            self._told = token
            return -float(found["logprob"])
        for other in range(VOCABULARY) if self._told is None else [self._told]:
            if found := self._force(other, before, VOCABULARY):
                self._told = other
                for entry in found["top_logprobs"]:
                    if entry["id"] == token:
                        return -float(entry["logprob"])
        raise RuntimeError(f"llama.cpp does not tell the probability of token {token}")

    def _force(self, token: int, before: list[int], count: int) -> dict[str, Any] | None:
        """What is told of a token, and of the ``count`` most probable ones; None if nothing is."""
        answer = self._server.handle_completions(
            {
                "prompt": before,
                "n_predict": 1,
                "n_probs": count,
                "logit_bias": [[token, FORCED]],
                "samplers": ["top_k"],
                "top_k": 1,
                "cache_prompt": True,
            }
        )
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp answers {answer}")
        told = (answer["choices"][0]["logprobs"] or {}).get("content") or [None]
        if told[0] is not None and told[0]["id"] != token:
            raise RuntimeError(f"llama.cpp chose token {told[0]['id']}, though {token} was forced")
        found: dict[str, Any] | None = told[0]
        return found


if __name__ == "__main__":
    main()
