"""What a tokenizer puts around a text, against transformers, mistral-common and the files themselves."""

import json
from pathlib import Path

import mistral_common
import pytest
import transformers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import processors

from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.text.test_tokenizer_json import byte_level

DATA = Path(mistral_common.__file__).parent / "data"
NAMES = [("<s>", 1), ("</s>", 2)]
TEXT = "The fox <s> jumps"
PROCESSORS = {
    "none": None,
    "byte level": processors.ByteLevel(trim_offsets=True),
    "bos": processors.TemplateProcessing("<s> $A", special_tokens=NAMES),
    "bos and eos": processors.TemplateProcessing("<s> $A </s>", special_tokens=NAMES),
    "eos": processors.TemplateProcessing("$A </s>", special_tokens=NAMES),
    "two": processors.TemplateProcessing("<s> <s> $A", special_tokens=NAMES),
    "sequence": processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", special_tokens=NAMES)]
    ),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
}
CONFIGS = {
    "nothing said": {},
    "add_bos_token": {"add_bos_token": True, "add_eos_token": True},  # which transformers leaves to the post-processor
    "no add_bos_token": {"add_bos_token": False, "add_eos_token": False},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_tokenizer_json_goes_by_its_post_processor(processor, config, tmp_path):
    library = byte_level()
    library.no_truncation()
    library.post_processor = PROCESSORS[processor]
    library.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | CONFIGS[config]))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.replace("<s>", "s")
    assert ours.encode_prompt(text) == theirs(text).input_ids
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    closed = [i for i in theirs(text).input_ids if i != 2] + [2]
    assert ours.encode_document(text) == closed


def test_tekken_and_mistral_s_sentencepiece_put_bos_before_a_text():
    tekken, reference = load_tokenizer(DATA / "tekken_240718.json"), Tekkenizer.from_file(DATA / "tekken_240718.json")
    assert tekken.encode_prompt(TEXT) == reference.encode(TEXT, bos=True, eos=False)
    assert tekken.encode_document(TEXT) == reference.encode(TEXT, bos=True, eos=True)
    assert load_tokenizer(DATA / "tokenizer.model.v1").encode_prompt("x")[0] == 1
