"""A model directory as a model of EleutherAI's lm-evaluation-harness, by the name `nemoe`.

    import nemoe_jax.evaluation.lm_eval_model  # registers it
    lm_eval.simple_evaluate(model="nemoe", model_args="pretrained=models/nemo", tasks=["hellaswag"])

The contract is that of the harness's Hugging Face model: the same boundary of tokens between a context and what
follows it, the same truncation from the left, the same windows of long texts, so that the two give equal scores.
"""

import functools
import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemoe_jax.checkpoints.pretrained import load_pretrained
from nemoe_jax.errors import UserError
from nemoe_jax.evaluation.lm_eval_text import HarnessText
from nemoe_jax.evaluation.scoring import Ending, score
from nemoe_jax.inference.generate import cache_dtype_of
from nemoe_jax.inference.generation_config import read_generation_config
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.serving.engine.request import Request
from nemoe_jax.serving.request_builder import RequestBuilder
from nemoe_jax.spec.mesh import make_mesh, parse_mesh
from nemoe_jax.text.tokenizers.load import load_tokenizer
from nemoe_jax.utils.progress import progress_bar

DEFAULT_NEW_TOKENS = 256  # of a task that does not say how many, as with the harness's own models
CONTEXTS_KEPT = 64  # the options of a question have their context in common
SAMPLING_WISHES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")

Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, the context's ids, what follows it


@register_model("nemoe")
class NemoeLM(TemplateLM):
    """A model directory with a tokenizer, on the devices of a mesh."""

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str | None = None,
        mesh: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        cache_dtype: str | None = None,
    ):
        """Loads the model.

        Args:
            pretrained: the model directory.
            dtype: to compute in; by default the weights' own.
            mesh: devices as axes, such as "fsdp=4,expert=2".
            batch_size: sequences computed together.
            max_length: tokens of a context at most; by default the model's.
            cache_dtype: of the keys and values of generated answers.

        Raises:
            UserError: no such model or tokenizer, or a mesh, dtype or length that does not fit.
        """
        super().__init__()
        self.tokenizer = load_tokenizer(pretrained)
        self.text = HarnessText(self.tokenizer)
        self.mesh = make_mesh(parse_mesh(mesh)) if mesh else None
        config, self.params = load_pretrained(pretrained, mesh=self.mesh, dtype=dtype, progress=True)
        self.model_config = read_generation_config(pretrained).with_end_tokens(config)
        self.builder = RequestBuilder(self.model_config, self.tokenizer)
        self.max_length = self.model_config.context if max_length is None else int(max_length)
        if not 1 <= self.max_length <= self.model_config.context:
            raise UserError(f"max_length: expected 1 to the context of {self.model_config.context}, got {max_length}")
        self.batch_size, self.cache_dtype = int(batch_size), cache_dtype
        if self.batch_size < 1:
            raise UserError(f"batch_size: expected a positive number, got {batch_size}")
        cache_dtype_of(self.params, cache_dtype)  # raises here, and not hours later
        self._encoded = functools.lru_cache(CONTEXTS_KEPT)(lambda *key: tuple(self.text.encode(*key)))

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token, or what stands in for it."""
        return self.text.prefix_id if self.tokenizer.eos_id is None else self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.text.prefix_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's file and a checksum of all of its files, for the harness's cache of requests."""
        digest = hashlib.sha256()
        for path in self.tokenizer.files:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return f"{self.tokenizer.path}__{digest.hexdigest()[:16]}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What says how chats are written: the template, or the version of Mistral's format."""
        return self.tokenizer.chat_template or f"Mistral {self.tokenizer.version}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the text that `tok_encode` reads."""
        text = self.text.chat(chat_history, add_generation_prompt)
        self._encoded.cache_clear()  # control tokens are read from now on
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the tokens around it that the tokenizer adds."""
        return list(self._encoded(string, add_special_tokens))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation of a context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        endings = []
        for texts, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                text = "" if texts is None else f": {texts[1]!r:.60}"
                wanted = f"expected a continuation of 1 to {self.max_length} tokens"
                raise UserError(f"loglikelihood: {wanted}, got {len(continuation)}{text}")
            tokens = np.array((context + continuation)[-(self.max_length + 1) :], np.int32)
            endings.append(Ending(tokens, len(continuation)))
        scored = score(self.model_config, self.params, endings, self.batch_size, self.mesh)
        answers = [(float(one.logprobs.sum(dtype=np.float64)), bool(one.greedy.all())) for one in scored]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the full context that score every token once."""
        windows: list[Pair] = []
        text_of: list[int] = []
        for number, request in enumerate(requests):
            ids = self.text.encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                text_of.append(number)
        totals = np.zeros(len(requests))
        for number, (logprob, _) in zip(text_of, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to the first of its stop texts."""
        from nemoe_jax.serving.engine.engine import Engine

        wanted = [self.request(*request.args) for request in requests]
        engine = Engine(
            self.model_config,
            self.params,
            self.tokenizer,
            max_num_seqs=self.batch_size,
            max_queued=len(wanted),
            mesh=self.mesh,
            cache_dtype=self.cache_dtype,
            deterministic=True,
        )
        with engine, progress_bar() as bar:
            answers = [engine.submit(one) for one in wanted]
            texts = [answer.result() for answer in bar.track(answers, description="generating")]
        failed = [answer.error for answer in answers if answer.error is not None]
        if failed:
            raise UserError(f"generate_until: {failed[0]}")
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def request(self, context: str, gen_kwargs: dict[str, Any]) -> Request:
        """The engine's request for a context and a task's `generation_kwargs`."""
        left: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, DEFAULT_NEW_TOKENS))
        until, new_tokens = left.pop("until"), left.pop("max_gen_toks")
        left.pop("do_sample")
        sampling = SamplingParams(**{name: left.pop(name) for name in SAMPLING_WISHES if name in left})
        if left:
            raise UserError(f"generation_kwargs: {', '.join(left)}: not known here")
        if not 1 <= new_tokens < self.max_length:
            raise UserError(
                f"max_gen_toks: expected 1 to {self.max_length - 1}, less than the context, got {new_tokens}"
            )
        ids = self.text.encode(context)[-(self.max_length - new_tokens) :]
        stop_tokens = () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)
        stop = tuple(text for text in until if text)
        template = Request((), new_tokens, sampling, stop=stop, stop_tokens=stop_tokens)
        return self.builder.of_tokens(template, ids)
