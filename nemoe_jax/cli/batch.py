"""Many prompts and chats from a file of JSON lines, and their responses line by line in the same order.

The input is checked as a whole before the weights are loaded. Responses are made together, written one by one as
soon as all before them are, and never lost: the same command goes on behind the last whole line of its output. Each
line has a key, a hash of the model and of the request, by which a changed batch or model is told.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from nemoe_jax.errors import UserError
from nemoe_jax.inference import sampling_fields
from nemoe_jax.serving.engine.completion import collect
from nemoe_jax.serving.engine.request import Request
from nemoe_jax.serving.request_builder import RequestBuilder
from nemoe_jax.utils.command import read_text
from nemoe_jax.utils.progress import progress_bar

if TYPE_CHECKING:
    from nemoe_jax.serving.engine.engine import Engine

AHEAD = 4  # times the slots: requests running or queued, so that a long response holds up no others
FIELDS = {
    "id",
    "prompt",
    "messages",
    "tools",
    "tool_choice",
    "schema",
    "preset",
    "max_new_tokens",
    "stop",
    "logprobs",
    *sampling_fields.SAMPLING_FIELDS,
}


class Job(NamedTuple):
    """A line of the input."""

    number: int  # from 1
    line: str
    name: Any  # its "id", which the response carries; None where it has none
    request: Request
    tools: Any


class Expected(NamedTuple):
    """What is kept of every line while the batch runs."""

    number: int
    prompt_tokens: int
    max_new_tokens: int
    key: str


def run(
    arguments: argparse.Namespace,
    builder: RequestBuilder,
    template: Request,
    start: Callable[..., contextlib.AbstractContextManager["Engine"]],
) -> None:
    """Responds to all lines of `arguments.batch` that `arguments.output` does not hold yet.

    Args:
        template: what lines do not say themselves.
        start: gives the engine.

    Raises:
        UserError: a line that makes no sense, an output of other work, or lines that the model could not answer; their
            response is an "error".
    """
    source, target = arguments.batch, arguments.output
    lines = [line for line in enumerate(read_text(source).split("\n"), 1) if line[1].strip()]
    model = _model_key(arguments, builder)
    expected = [
        Expected(job.number, len(job.request.prompt), job.request.max_new_tokens, _key(model, job))
        for job in jobs(lines, source, builder, template)
    ]
    done = 0 if target == "-" else _finished(Path(target), expected)
    failed: list[int] = []
    if done < len(expected):
        longest = max(one.prompt_tokens + one.max_new_tokens for one in expected[done:])
        slots = min(arguments.max_num_seqs, len(expected) - done)
        todo = jobs(lines[done:], source, builder, template)
        with (
            start(max_num_seqs=slots, kv_tokens=slots * longest, max_queued=AHEAD * slots) as engine,
            _opened(target) as out,
            progress_bar() as bar,
        ):
            task = bar.add_task("answering", total=len(expected), completed=done)
            for job, figures in _answers(engine, todo, AHEAD * slots, builder):
                name = {} if job.name is None else {"id": job.name}
                row = {"line": job.number, **name, **figures, "key": _key(model, job)}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                bar.advance(task)
                failed += [job.number] if "error" in figures else []
    if failed:
        raise UserError(f"{source}: {len(failed)} of {len(expected)} lines got an error, line {failed[0]} the first")


def jobs(lines: Iterable[tuple[int, str]], source: str, builder: RequestBuilder, template: Request) -> Iterator[Job]:
    """What numbered lines ask for; `template` is what they do not say themselves. Raises UserError with the line."""
    for number, line in lines:
        try:
            fields = json.loads(line)
            yield Job(number, line, fields.get("id"), _request(fields, builder, template), fields.get("tools"))
        except UserError as error:
            raise UserError(f"{source}:{number}: {error}") from error
        except (ValueError, RecursionError, AttributeError) as error:
            raise UserError(f"{source}:{number}: expected a JSON object, got {line!r:.80}") from error


def _request(fields: Mapping[str, Any], builder: RequestBuilder, template: Request) -> Request:
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r:.80}; expected {', '.join(sorted(FIELDS))}")
    if ("prompt" in fields) == ("messages" in fields):
        raise UserError('expected either a "prompt" or "messages"')
    stop = fields.get("stop", template.stop)
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise UserError(f"stop: expected a string or a list of strings, got {stop!r:.80}")
    template = dataclasses.replace(
        template,
        max_new_tokens=_whole(fields, "max_new_tokens", 1, template.max_new_tokens),
        sampling=sampling_fields.from_fields(template.sampling, fields),
        stop=tuple(stop),
        top_logprobs=_whole(fields, "logprobs", 0, template.top_logprobs),
    )
    schema = fields.get("schema")
    if "messages" in fields:
        return builder.of_chat(template, fields["messages"], fields.get("tools"), fields.get("tool_choice"), schema)
    if not isinstance(fields["prompt"], str):
        raise UserError(f"prompt: expected a string, got {fields['prompt']!r:.80}")
    return builder.of_text(template, fields["prompt"], schema)


def _whole(fields: Mapping[str, Any], name: str, least: int, otherwise: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return otherwise
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}: expected an integer of at least {least}, got {value!r:.80}")
    return value


def _answers(
    engine: "Engine", todo: Iterable[Job], ahead: int, builder: RequestBuilder
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """The responses in order, with up to `ahead` of them under way."""
    under_way: deque[tuple[Job, Any]] = deque()

    def first() -> tuple[Job, dict[str, Any]]:
        job, answer = under_way.popleft()
        try:
            whole = collect(answer, builder.end_tokens, parser=builder.parser(job.tools) if job.tools else None)
        except UserError as error:
            return job, {"error": str(error)}
        return job, whole.figures(builder.tokenizer, len(job.request.prompt), job.request.top_logprobs is not None)

    for job in todo:
        if len(under_way) == ahead:
            yield first()
        under_way.append((job, engine.submit(job.request)))
    while under_way:
        yield first()


def _model_key(arguments: argparse.Namespace, builder: RequestBuilder) -> str:
    """A hash of the model, of the adapter's files and of what else decides about every response."""
    from nemoe_jax.checkpoints.fingerprint import model_fingerprint

    digest = hashlib.sha256(model_fingerprint(arguments.directory).encode())
    for path in sorted(Path(arguments.adapter).glob("adapter_*")) if arguments.adapter else ():
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update(repr((arguments.dtype, arguments.kv_cache, sorted(builder.end_tokens))).encode())
    return digest.hexdigest()


def _key(model: str, job: Job) -> str:
    """What a response depends on, in 16 hexadecimal digits."""
    request = job.request
    settings = [request.max_new_tokens, dataclasses.asdict(request.sampling), request.stop, request.top_logprobs]
    content = json.dumps([model, job.line, list(map(int, request.prompt)), settings], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _finished(path: Path, expected: Sequence[Expected]) -> int:
    """How many responses a file holds already; what is left of an interrupted line is cut off. Raises UserError."""
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        numbers = []
        for at, line in enumerate(whole.splitlines()):
            answer = json.loads(line)
            if answer["line"] != expected[at].number or answer["key"] != expected[at].key:
                raise ValueError
            numbers.append(expected[at].number)
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path}: line {at + 1} is no response of this model to what the batch asks there; expected a new file"
        ) from error
    return len(numbers)


@contextlib.contextmanager
def _opened(target: str) -> Iterator[IO[str]]:
    if target == "-":
        yield sys.stdout
        return
    try:
        with Path(target).open("a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from error
