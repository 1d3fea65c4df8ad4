"""What guessing from the prompt saves where the response repeats much of it: a file to be edited.

    python -m benchmarks.serving.prompt_lookup DIR [--lines 400]     (a model directory; several minutes)

Tokens per second after the first token, of a lone response and of 8 at once. The prompt is a file of so many lines, out
of Python's own library, and the first quarter of a copy with `this` for `self`; the response is the rest. The small
models that fit this benchmark do not copy files of that length: their tokens are computed and sampled as ever, but both
engines then take those of the copy instead. With `--own` the response is the model's.

Named peer: the same engine without prompt look-up. They take turns, and the best turn of each counts; compilation is
done before. Limits: alone 1.8 times the peer's tokens per second, and of 8 at once no less than 0.97 times. Beside it:
what part of the response is in the file, in runs of four tokens at least, how many tokens came of a lone step that
checked guesses, and in how many turns both engines gave the same tokens, which says something with `--own` alone.
"""

import calendar
import difflib
import inspect
import shlex
import textwrap
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from benchmarks.lib.peers import clock, judge, opened, parser
from nemoe_jax.inference import decode

SLOTS = 8
LIMITS = {"alone": 1.8, "8 at once": 0.97}


def main() -> None:
    """Measures, prints, and says whether the limits are kept."""
    flags = parser(__doc__, 3)
    flags.add_argument("--lines", type=int, default=400, help="of the file (default 400)")
    flags.add_argument("--new", type=int, default=256, help="tokens of a response (default 256)")
    flags.add_argument("--alone", action="store_true", help="not 8 at once, which take long with a long file")
    flags.add_argument("--own", action="store_true", help="take the model's tokens")
    options = flags.parse_args()
    counts = {"alone": 1} if options.alone else {"alone": 1, "8 at once": SLOTS}
    size = options.lines, options.new, options.turns
    figures, more = measure(options.directory, *size, clock(options), counts, options.own)
    ratios = {name: figures[f"{name}, prompt look-up"] / figures[f"{name}, without"] for name in counts}
    limits = {name: LIMITS[name] for name in counts}
    judge("prompt_lookup", options, figures, "tokens per second", ratios, limits, lines=options.lines, **more)


def source(lines: int) -> str:
    """The beginning of some modules."""
    return "\n".join("\n".join(map(inspect.getsource, (shlex, textwrap, calendar))).splitlines()[:lines])


def repeated(file: list[int], response: list[int]) -> float:
    """What part of a response is in the file."""
    blocks = difflib.SequenceMatcher(None, file, response, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks if block.size >= 4) / len(response)


def take_instead(tokens: list[int]) -> None:
    """The response is this, whatever is sampled; for programs that are not compiled yet."""
    sample, tokens_N = decode.sample, jnp.asarray(tokens)

    def given(logits_BV: Any, controls: Any, counts: Any, step_B: Any, allowed_BW: Any = None) -> Any:
        chosen_B = sample(logits_BV, controls, counts, step_B, allowed_BW)
        return jnp.where(chosen_B < 0, chosen_B, tokens_N.at[step_B].get(mode="clip"))

    decode.sample = given


def measure(
    directory: str, lines: int, new: int, turns: int, now: Callable[[], float], counts: dict[str, int], own: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """Tokens per second by name, and what came of the guesses."""
    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.serving.engine.request import Request

    config, params, tokenizer = opened(directory)
    file = source(lines)
    copy = file.replace("self", "this")
    begun = "".join(copy.splitlines(keepends=True)[: lines // 4])
    prompt = tuple(tokenizer.encode_prompt(f"{file}\n\n\n{begun}"))
    if not own:
        take_instead(tokenizer.encode(copy[len(begun) :]))
    steps: list[int] = []

    def start(prompt_lookup: bool) -> Engine:
        tokens = SLOTS * (len(prompt) + new + 256)
        engine = Engine(config, params, tokenizer, max_num_seqs=SLOTS, kv_tokens=tokens, prompt_lookup=prompt_lookup)
        step = engine._runner.decode

        def counted(*given: Any, **options: Any) -> Any:
            block = step(*given, **options)
            if given[-1] is not None and len(given[1]) == 1:
                steps.append(int(block.num_generated_B.sum()))
            return block

        engine._runner.decode = counted  # type: ignore[method-assign]
        return engine

    def run(engine: Engine, count: int) -> tuple[float, list[Any]]:
        """Tokens per second behind the first token of each, and the tokens."""
        first: list[float] = []
        answers = [
            engine.submit(Request(prompt, new, ignore_eos=True), lambda output: first.append(now()))
            for _ in range(count)
        ]
        for answer in answers:
            answer.result()
        began, ended = first[0], now()
        return count * (new - 1) / (ended - began), [[one.token for one in answer.tokens] for answer in answers]

    rates: dict[str, list[float]] = {}
    same = 0
    with start(True) as guessing, start(False) as plain:
        for turn in range(turns + 1):  # the first one compiles, and fills the prefix cache
            for name, count in counts.items():
                tokens = []
                for way, engine in (("prompt look-up", guessing), ("without", plain)):
                    rate, generated = run(engine, count)
                    tokens.append(generated)
                    if turn:
                        rates.setdefault(f"{name}, {way}", []).append(rate)
                same += bool(turn) and tokens[0] == tokens[1]
    more = {
        "part_in_the_file": repeated(tokenizer.encode(file), tokens[0][0]),
        "tokens_of_a_checking_step": sum(steps) / len(steps) if steps else 0.0,
        "same_tokens": [same, len(counts) * turns],
    }
    return {name: max(values) for name, values in rates.items()}, more


if __name__ == "__main__":
    main()
