"""Small tokenizers whose chat formats or templates have calls of tools."""

import json
from pathlib import Path

import mistral_common
import tokenizers

from nemoe_jax.text.tokenizers.load import Tokenizer, cut_tekken, load_tokenizer
from tests.text.test_tokenizer_json import byte_level, metaspace, save

DATA = Path(mistral_common.__file__).parent / "data"
TAGGED = "{% for m in messages %}<|im_start|>{{ m.content }}<tool_call>\n</tool_call>{% endfor %}"


def tekken_versions(directory: Path, size: int) -> dict[str, Tokenizer]:
    """Tekken's chat formats on a cut of `size` tokens, by version."""
    cut_tekken(DATA / "tekken_240718.json", directory / "small.json", size)
    spec = json.loads((directory / "small.json").read_text())
    spec["special_tokens"] += [
        {"rank": 20 + at, "token_str": name, "is_control": True} for at, name in enumerate(("[ARGS]", "[CALL_ID]"))
    ]
    spec["config"] |= {"default_num_special_tokens": 30, "default_vocab_size": size + 10}
    made = {}
    for version in ("v3", "v7", "v11", "v13"):
        spec["config"]["version"] = version
        path = directory / f"tekken_{version}.json"
        path.write_text(json.dumps(spec))
        made[version] = load_tokenizer(path)
    return made


def with_template(
    directory: Path, library: tokenizers.Tokenizer, template: str | None, special: tuple[str, ...] = ()
) -> Tokenizer:
    """A `tokenizer.json` in a new directory, with control tokens and a chat template."""
    directory.mkdir()
    library.add_special_tokens(list(special))
    save(library, directory, tokenizer_config={"chat_template": template} if template else {})
    return load_tokenizer(directory)


def with_tags(directory: Path) -> dict[str, Tokenizer]:
    """Those whose template writes calls between tags: as text, as control tokens, behind a space."""
    tags = ("<tool_call>", "</tool_call>")
    return {
        "tags": with_template(directory / "tags", byte_level(), TAGGED),
        "control tags": with_template(directory / "control tags", byte_level(), TAGGED, tags),
        "spaced tags": with_template(directory / "spaced tags", metaspace(), TAGGED),
    }
