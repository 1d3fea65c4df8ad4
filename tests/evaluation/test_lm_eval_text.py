"""Text and chats as the lm-evaluation-harness's Hugging Face model reads them."""

import json
from pathlib import Path

import pytest
import tokenizers

mistral_common = pytest.importorskip("mistral_common")
transformers = pytest.importorskip("transformers")

from nemoe_jax.errors import UserError
from nemoe_jax.evaluation.lm_eval_text import HarnessText
from nemoe_jax.text.chat.render import render_chat
from nemoe_jax.text.tokenizers.load import cut_tekken, load_tokenizer

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
CORPUS = ["Hello world, is this a text? <|im_start|> user it is.", "One and two and three; a </s> in it."] * 4
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and loop.length > 3 %}{{ raise_exception('too long') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = [{"role": "user", "content": "Is it?"}]
SHOT = [{"role": "user", "content": "Was it?"}, {"role": "assistant", "content": "It was. "}, *QUESTION]
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {"question": QUESTION, "shot": SHOT, "system": [SYSTEM, *QUESTION], "system refused": [SYSTEM, *SHOT]}
TEXTS = ["", "Hello", " Hello world ", "<s>Hello", "<s> Hello</s> it", "a <|im_start|>user\nIt", "[INST] x"]
POST_PROCESSORS = {"none": None, "before": "<s> $A", "behind": "$A </s>", "around": "<s> $A </s>"}


def write_byte_level(directory, single=None):
    """A byte-level BPE of a few merges, as most Hugging Face directories have."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if single:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )


@pytest.mark.parametrize("single", POST_PROCESSORS.values(), ids=POST_PROCESSORS.keys())
def test_texts_have_the_ids_of_transformers(tmp_path, single):
    write_byte_level(tmp_path, single)
    ours, theirs = HarnessText(load_tokenizer(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        surrounded = not text.startswith("<s>")  # the harness's rule
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=surrounded), text
        for flag in (False, True):
            assert ours.encode(text, flag) == theirs.encode(text, add_special_tokens=flag), text
    assert ours.prefix_id == 1


def test_texts_have_the_ids_of_transformers_with_a_tekken_file(tmp_path):
    cut_tekken(TEKKEN, tmp_path / "tekken.json", 1500)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    ours, theirs = HarnessText(load_tokenizer(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        surrounded = not text.startswith("<s>")
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=surrounded), text


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
def test_chats_are_the_texts_of_transformers(tmp_path, chat):
    write_byte_level(tmp_path)
    ours, theirs = HarnessText(load_tokenizer(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    accepted = chat[1:] if len(chat) > 3 else chat  # the template refuses a system message then
    expected = theirs.apply_chat_template(accepted, tokenize=False, add_generation_prompt=True)
    assert ours.chat(chat, True) == expected
    assert ours.encode(expected) == render_chat(ours.tokenizer, accepted)
    begun = [*accepted, {"role": "assistant", "content": "It is"}]
    expected = theirs.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert ours.chat([*chat, begun[-1]], False) == expected and expected.endswith("It is")


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
def test_chats_of_mistral_s_format_keep_their_ids(tmp_path, chat):
    cut_tekken(TEKKEN, tmp_path / "tekken.json", 1500)
    text = HarnessText(load_tokenizer(tmp_path))
    assert text.encode("[INST]")[:1] == [1] and len(text.encode("[INST]")) > 2  # no chat was asked for
    assert text.encode("<s>[INST]")[0] != 1
    assert text.encode(text.chat(chat, True)) == render_chat(text.tokenizer, chat)
    begun = [*chat, {"role": "assistant", "content": "It is"}]
    assert text.encode(text.chat(begun, False)) == render_chat(text.tokenizer, begun, continue_answer=True)


def test_a_chat_that_cannot_be_written_is_refused(tmp_path):
    cut_tekken(TEKKEN, tmp_path / "tekken.json", 1500)
    text = HarnessText(load_tokenizer(tmp_path))
    for wrong in ([], [{"role": "nobody", "content": "x"}], [*QUESTION, {"role": "assistant", "content": ""}]):
        with pytest.raises(UserError):
            text.chat(wrong, True)
