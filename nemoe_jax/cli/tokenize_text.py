"""`nemoe tokenize`: text as token ids; `nemoe tokenize compare`: several tokenizers on the same text."""

import argparse
import fnmatch
import json
from pathlib import Path

from nemoe_jax.cli import model_flags
from nemoe_jax.errors import UserError
from nemoe_jax.utils.command import Command, read_text

COMPARISON = """\
The first two arguments are tokenizers, and so are further ones that are a directory with a tokenizer or are named like
one (tekken*.json, tokenizer*.json, *.model, *.model.v3); text follows: files, globs, or directories, of which the files
in --suffix are read. Of a .jsonl file, the "text" of each line counts.

  nemoe tokenize compare models/nemo tokenizer.model.v1 texts --by language --plot ratio.svg

The ratio is a tokenizer's tokens over the first one's. A file's language is a code in its name or its directory's
(messages.fr.txt, fr.txt, fr/help/index.txt), or else its directory's name. A word is what stands between white space,
so there are none in Chinese, Japanese, Thai and others. The control tokens that begin and end a text are not counted.
"""


def add(command: Command) -> None:
    """Registers `tokenize` and `tokenize compare`."""
    parser = command.add(
        "tokenize",
        _tokenize,
        "print the token ids of text as a JSON list",
        "Control tokens that the text spells out, such as [INST], stay plain text.\n"
        "`nemoe tokenize compare A B FILES…` counts the tokens of several tokenizers: see its --help.",
    )
    parser.add_argument(
        "tokenizer", metavar="DIR|FILE", help="a model directory, tekken.json, tokenizer.json or tokenizer.model"
    )
    parser.add_argument(
        "file", nargs="?", default="-", metavar="FILE|-", help="text to tokenize (default: standard input)"
    )
    parser.add_argument(
        "--chat", metavar="FILE", help="tokenize a JSON list of messages in the model's chat format instead"
    )
    parser.add_argument("--pieces", action="store_true", help="print the text of each token instead of its id")

    parser = command.add(
        "tokenize compare",
        _compare,
        "count the tokens of several tokenizers on the same text",
        COMPARISON,
        reports=True,
    )
    parser.usage = "%(prog)s [-h] [options] A B [C …] TEXT…"
    parser.add_argument("words", nargs="+", metavar="A B [C …] TEXT…", help="two tokenizers or more, then text")
    parser.add_argument("--by", choices=("file", "language"), help="a row for each (default: all text together)")
    parser.add_argument(
        "--suffix",
        action="append",
        metavar=".txt",
        help="files to read in directories; may be given again (default: .txt and .jsonl)",
    )
    parser.add_argument("--plot", metavar="FILE.png|.svg", type=Path, help="also draw the ratios as bars")


def _tokenize(arguments: argparse.Namespace) -> None:
    from nemoe_jax.text.chat import render
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    if arguments.chat:
        ids = render.render_chat(
            tokenizer, render.read_messages(arguments.chat), tools=render.read_tools(arguments.chat)
        )
    else:
        ids = tokenizer.encode(read_text(arguments.file))
    print(json.dumps([tokenizer.piece(token) for token in ids] if arguments.pieces else ids, ensure_ascii=False))


def _compare(arguments: argparse.Namespace) -> None:
    from nemoe_jax.evaluation.tokenizer_plot import check_plot, draw, print_table, write_plot
    from nemoe_jax.evaluation.tokenizer_stats import ALL, compare, grouped
    from nemoe_jax.text.corpus import TEXT_SUFFIXES, find_files
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    paths, patterns = _split(arguments.words)
    if arguments.plot:
        check_plot(arguments.plot)
    names = _names(paths)
    tokenizers = [load_tokenizer(path) for path in paths]
    counts = compare(tokenizers, find_files(patterns, suffixes=arguments.suffix or TEXT_SUFFIXES))
    groups = grouped(counts, arguments.by)
    if len(groups) > 1:
        groups |= {f"({ALL})": grouped(counts, None)[ALL]}
    if arguments.plot:
        write_plot(draw(groups, names), arguments.plot)
    if not arguments.json:
        print_table(groups, names)
        return
    described = {
        name: {"path": path, "kind": tokenizer.kind, "vocabulary": tokenizer.vocab_size}
        for name, path, tokenizer in zip(names, paths, tokenizers, strict=True)
    }
    rows = [{"name": name, **count.figures(names)} for name, count in groups.items()]
    print(json.dumps({"tokenizers": described, "by": arguments.by, "rows": rows}, ensure_ascii=False))


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The tokenizers and the text among the arguments."""
    tokenizers = next((i for i, word in enumerate(words) if i > 1 and not _is_tokenizer(Path(word))), len(words))
    if tokenizers < 2:
        raise UserError(f"tokenize compare: expected two tokenizers and text, got only {words[0]}")
    if tokenizers == len(words):
        raise UserError(f"tokenize compare: expected text after the tokenizers {', '.join(words)}")
    return words[:tokenizers], words[tokenizers:]


def _is_tokenizer(path: Path) -> bool:
    """Whether a path is named like a tokenizer's file, or is a directory that holds one."""
    from nemoe_jax.checkpoints.gguf.naming import is_gguf
    from nemoe_jax.text.tokenizers.load import FILES

    if is_gguf(path):
        return True
    if path.is_dir():
        return any(any(path.glob(pattern)) for pattern in FILES)
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in FILES)


def _names(paths: list[str]) -> list[str]:
    """What to call the tokenizers: the last part of each path, or the whole where that is not distinct.

    Raises:
        UserError: the same path twice.
    """
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"tokenize compare: {path}: given twice")
    last = [model_flags.name_of(path) for path in paths]
    return last if len(set(last)) == len(last) else paths
