"""Benchmark requests scored by us and by the lm-evaluation-harness's own Hugging Face model, on the same directories.

    python -m benchmarks.evaluation.lm_eval runs/demo/dense runs/demo/repaired --text runs/demo/text/held-out.jsonl

Named peer: `lm_eval`'s HFLM in torch, float32 (but for its cache of logits, which in 0.4.13 takes a continuation's
log-likelihood at another's place where their inputs are equal and their contexts are not). From the text come questions
of four options each, whole documents, and beginnings to go on with up to a line's end.

Limit: log-likelihoods that differ by at most 1e-4 and 1e-5 of what they are (a router may find two experts all but
equal and choose otherwise: up to 0.4 nats on one token of some ten thousand); the same options chosen; equal answers.
"""

import argparse
import operator
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.lib.results import add_keep, keep, machine
from nemoe_jax.evaluation.lm_eval_model import NemoeLM
from nemoe_jax.text.corpus import read_documents

QUESTIONS, OPTIONS, DOCUMENTS, ANSWERS = 40, 4, 12, 24


def requests(documents: Sequence[str]) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of the harness's three kinds of request."""
    random = np.random.default_rng(0)
    questions = []
    for number, document in enumerate(documents[:QUESTIONS]):
        cut = int(random.integers(0, min(len(document), 2000)))
        options = [document[cut:], *(documents[other] for other in random.choice(len(documents), OPTIONS - 1))]
        context = document[:cut] if number else ""
        questions += [(context, " " * bool(context) + option[:60]) for option in options]
    until = {"until": ["\n", "."], "max_gen_toks": 24}
    return {
        "loglikelihood": questions,
        "loglikelihood_rolling": [(document,) for document in documents[:DOCUMENTS]],
        "generate_until": [(document[:200], dict(until)) for document in documents[:ANSWERS]],
    }


def main() -> None:
    """Asks both sides, prints, exits with 1 where they disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model directories with a tokenizer")
    parser.add_argument("--text", required=True, help="documents, one JSON object with a text a line")
    add_keep(parser)
    arguments = parser.parse_args()
    asked = requests(list(read_documents(Path(arguments.text))))
    figures, missed = {}, False
    print(f"{'':32}{'requests':>9}{'difference':>12}{'of limit':>9}{'equal':>9}")
    for directory in arguments.models:
        ours = NemoeLM(directory, dtype="float32")
        theirs = HFLM(directory, device="cpu", dtype="float32", batch_size=8, logits_cache=False)
        for kind, given in asked.items():
            instances = [Instance(kind, {}, one, number) for number, one in enumerate(given)]  # type: ignore[arg-type]
            found, wanted = (getattr(side, kind)(instances) for side in (ours, theirs))
            figure: dict[str, Any] = {"requests": len(given)}
            if kind != "generate_until":
                scores, peer_scores = (np.array(of, float).reshape(len(given), -1)[:, 0] for of in (found, wanted))
                differences = np.abs(scores - peer_scores)
                figure["difference"] = float(differences.max())
                figure["of_limit"] = float((differences / (1e-4 + 1e-5 * np.abs(peer_scores))).max())
                missed |= figure["of_limit"] > 1
                found, wanted = (list(of.reshape(-1, OPTIONS).argmax(1)) for of in (scores, peer_scores))
            if kind != "loglikelihood_rolling":
                figure |= {"equal": int(sum(map(operator.eq, found, wanted))), "of": len(wanted)}
                missed |= figure["equal"] < figure["of"]
            figures[f"{Path(directory).name} {kind}"] = figure
            cells = [f"{figure[name]:.1e}" if name in figure else "" for name in ("difference", "of_limit")]
            equal = f"{figure['equal']}/{figure['of']}" if "equal" in figure else ""
            print(f"{Path(directory).name + ' ' + kind:32}{len(given):9}{cells[0]:>12}{cells[1]:>9}{equal:>9}")
    if arguments.keep:
        keep("lm_eval", {**machine(("jax", "lm_eval", "torch", "transformers")), "figures": figures})
    sys.exit(missed)


if __name__ == "__main__":
    main()
