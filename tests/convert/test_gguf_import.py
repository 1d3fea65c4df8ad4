"""GGUF in: the values of transformers' own loader, the logits and the token ids of llama.cpp on the same file."""

import dataclasses
import functools
import json
import os
import shutil
import time
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert.cli import main
from convert.gguf import export
from convert.gguf.from_gguf import FromGgufOptions, from_gguf
from nemoe_jax.checkpoints.gguf.config import config_json
from nemoe_jax.checkpoints.gguf.directory import model_directory
from nemoe_jax.checkpoints.gguf.header import GgufHeader, GgufTensor, read_header
from nemoe_jax.checkpoints.gguf.pre_tokenizers import GPT2, PRE_TOKENIZERS, QWEN2
from nemoe_jax.checkpoints.pretrained import load_pretrained
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.cli.main import main as nemoe
from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.convert.test_gguf_tokenizer import TEXTS, TOKENIZERS, small_model, split_by, train
from tests.support.compiled import forward
from tests.support.llama_server import COMMON, MODELS, LlamaCpp, cut, save

PROMPT = [1, 300, 1200, 30, 500, 77]
Type = gguf.GGMLQuantizationType


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of the tests' own."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


@pytest.fixture(scope="module", params=MODELS)
def there(request, tmp_path_factory) -> tuple[Path, Path]:
    """(the model directory that a GGUF file was made of, the file)."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    save(directory, MODELS[request.param])
    cut(directory, COMMON["vocab"])
    export.to_gguf(directory, directory / "model.gguf", export.GgufOptions())
    return directory, directory / "model.gguf"


def test_there_and_back_is_the_same_bit_for_bit(there, tmp_path):
    directory, file = there
    manifest = from_gguf(file, tmp_path / "back")
    original, back = Checkpoint(directory), Checkpoint(tmp_path / "back")
    assert manifest.result.dtype == "float32"
    for key in original.files:
        np.testing.assert_array_equal(original.view(key), back.view(key), err_msg=key)
    same_math = {"mistral": "llama"}.get(original.config.family, original.config.family)
    assert back.config == original.config.replace(family=same_math)
    ids = load_tokenizer(directory).encode(TEXTS[0])
    assert load_tokenizer(tmp_path / "back").encode(TEXTS[0]) == ids


def tensor_types() -> dict[str, Type]:
    """Every quantized type that the gguf package can be asked for, each by some tensor of `mixed`."""
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    types = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K)
    types += (Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS, Type.F16, Type.BF16)
    places = [f"blk.{layer}.{part}.weight" for layer in range(2) for part in parts]
    return {"token_embd.weight": Type.Q8_0, "output.weight": Type.Q6_K, **dict(zip(places, types, strict=True))}


# {type: (bytes of a block at which its float16 scales are)}
SCALES = {
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}


def quantized(values: np.ndarray, kind: Type, random: np.random.Generator) -> np.ndarray:
    """As bytes: the package's quantization, or where it has none, random blocks of the values' size."""
    if kind not in SCALES:
        return gguf.quants.quantize(values, kind)
    shape = gguf.quants.quant_shape_to_byte_shape(values.shape, kind)
    blocks = random.integers(0, 256, shape, np.uint8).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])

    def set_scales(scale: float) -> np.ndarray:
        for at in SCALES[kind]:
            blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
        return gguf.quants.dequantize(blocks.reshape(shape), kind)

    set_scales(float(values.std() / set_scales(1.0).std()))
    return blocks.reshape(shape)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Type]], values: dict[str, object], **options) -> None:
    """A llama file; a value None leaves its key out."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    sizes = {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "rope.freq_base": 30000.0,
        "attention.layer_norm_rms_epsilon": 1e-3,
    }
    given = {f"llama.{key}": value for key, value in sizes.items()} | values
    for key, value in given.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if value is not None and key != "general.architecture":
            add[type(value)](key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SHAPES = {
    "attn_q": (256, 256),
    "attn_k": (64, 256),
    "attn_v": (64, 256),
    "attn_output": (256, 256),
    "ffn_gate": (512, 256),
    "ffn_up": (512, 256),
    "ffn_down": (256, 512),
}
VOCAB = 320
UNUSED = VOCAB - 259
TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [
        "<s>",
        "</s>",
        *gguf.vocab.bytes_to_unicode().values(),
        "ab",
        *(f"[PAD{i}]" for i in range(UNUSED)),
    ],
    "tokenizer.ggml.token_type": [3, 3, *[1] * 257, *[5] * UNUSED],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


@functools.cache
def tensors(plain: bool = False) -> dict[str, tuple[np.ndarray, Type]]:
    """Those of `mixed`; `plain`: dequantized."""
    random = np.random.default_rng(1)
    shapes = {"token_embd.weight": (VOCAB, 256), "output.weight": (VOCAB, 256)}
    shapes |= {f"blk.{layer}.{part}.weight": shape for layer in range(2) for part, shape in SHAPES.items()}
    made: dict[str, tuple[np.ndarray, Type]] = {}
    for name, kind in tensor_types().items():
        values = random.normal(0, 1.5 / shapes[name][1] ** 0.5, shapes[name]).astype(np.float32)
        data = quantized(values, kind, random)
        made[name] = (gguf.quants.dequantize(data, kind), Type.F32) if plain else (data, kind)
    norms = ["output_norm.weight", *(f"blk.{i}.{part}_norm.weight" for i in range(2) for part in ("attn", "ffn"))]
    return made | {name: (random.normal(1, 0.2, 256).astype(np.float32), Type.F32) for name in norms}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A file in which every type occurs."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    write(path, tensors(), TOKENS)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The same with every tensor dequantized."""
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    write(path, tensors(plain=True), TOKENS)
    return path


def test_every_type_has_the_values_that_transformers_reads(mixed, tmp_path):
    from_gguf(mixed, tmp_path / "model", FromGgufOptions(dtype="float32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixed.parent, gguf_file=mixed.name, dtype=torch.float32)
    expected = theirs.state_dict()
    ours = Checkpoint(tmp_path / "model")
    assert ours.files.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(ours.view(key), tensor.numpy(), err_msg=key)
    tokens = torch.tensor([[3, 200, 77, 31, 254, 9]])
    config, params = load_pretrained(mixed, dtype=jnp.float32)
    logits = forward(config, params, jnp.asarray(tokens.numpy())).logits
    np.testing.assert_allclose(logits, theirs(tokens).logits.detach().numpy(), atol=2e-4)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(opened(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)


def test_logits_are_those_of_llama_cpp(mixed, plain):
    """Exactly on dequantized weights; nearly on quantized ones, by which llama.cpp multiplies activations in 8 bits."""
    tokens = [3, 200, 77, 31, 254, 9]
    config, params = load_pretrained(mixed, dtype=jnp.float32)
    ours_V = jax.nn.log_softmax(forward(config, params, jnp.asarray([tokens])).logits[0, -1])
    np.testing.assert_allclose(LlamaCpp(plain).log_probabilities(tokens, VOCAB), ours_V, atol=5e-4)
    theirs_V = LlamaCpp(mixed).log_probabilities(tokens, VOCAB)
    assert np.abs(theirs_V - ours_V).mean() < 0.15 * np.std(ours_V)


def test_a_quantized_file_becomes_bfloat16_by_default(mixed, tmp_path):
    manifest = from_gguf(mixed, tmp_path / "model")
    assert manifest.result.dtype == "bfloat16"
    exact = Checkpoint(mixed).view("model.layers.0.mlp.up_proj.weight")
    rounded = Checkpoint(tmp_path / "model").view("model.layers.0.mlp.up_proj.weight")
    np.testing.assert_array_equal(exact.astype(rounded.dtype), rounded)


def test_a_split_model_is_read_from_any_of_its_files(mixed, tmp_path):
    write(tmp_path / "split.gguf", tensors(), TOKENS, split_max_tensors=5)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 5
    whole = Checkpoint(mixed)
    split = Checkpoint(parts[3])
    assert split.directory.name == "split"
    for key in whole.files:
        np.testing.assert_array_equal(whole.view(key), split.view(key))
    parts[2].unlink()
    with pytest.raises(UserError, match=r"split-00003-of-00005.gguf: file 3 of 5 .* is missing"):
        read_header(parts[0])


def default_rules(directory: Path) -> None:
    train(directory, split_by(GPT2))


def smollm(directory: Path) -> None:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    train(directory, pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


NAMED = {"default": default_rules, "smollm": smollm, "qwen2": lambda to: train(to, split_by(QWEN2))}


@pytest.fixture(scope="module", params=[*TOKENIZERS, *NAMED])
def tokenizers(request, tmp_path_factory):
    """(ours from a GGUF file, llama.cpp's) of each kind of tokenizer."""
    make = {**TOKENIZERS, **NAMED}[request.param]
    directory = small_model(tmp_path_factory.mktemp("model"), make)
    file = directory / "model.gguf"
    with pytest.MonkeyPatch.context() as patch:
        if request.param in NAMED:  # under the name that is tested
            patch.setattr(export, "read_vocabulary", functools.partial(named_vocabulary, request.param))
        export.to_gguf(directory, file, export.GgufOptions())
    from_gguf(file, directory / "back")
    return load_tokenizer(directory / "back"), LlamaCpp(file)


def named_vocabulary(name: str, directory: Path, rows: int):
    """The vocabulary of a directory, its words cut by the rules of that name."""
    content = json.loads((directory / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return dataclasses.replace(read_vocabulary(directory, rows), pre=name)


read_vocabulary = export.read_vocabulary


def test_token_ids_are_those_of_llama_cpp(tokenizers):
    ours, theirs = tokenizers
    texts = [*TEXTS, "a<think>b", "x = 3.14159; y+=<a|b>$5 12345678"]
    expected = {text: theirs.tokenize(text, parse_special=False) for text in texts}
    assert {text: ours.encode(text) for text in texts} == expected
    assert ours.encode_prompt(texts[0]) == theirs.tokenize(texts[0], add_special=True)


def test_every_name_of_a_pre_tokenizer_is_tried():
    names = {"tekken", "llama-bpe", "gpt-2", *NAMED}
    assert names == set(PRE_TOKENIZERS)


def test_what_ends_a_response_and_the_templates_come_along(tmp_path):
    values = TOKENS | {
        "tokenizer.ggml.tokens": [*TOKENS["tokenizer.ggml.tokens"][:259], "<|im_end|>"],
        "tokenizer.ggml.token_type": [*TOKENS["tokenizer.ggml.token_type"][:259], 3],
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "general.sampling.temp": 0.3,
    }
    write(tmp_path / "model.gguf", tensors(), values)
    from_gguf(tmp_path / "model.gguf", tmp_path / "model")
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [1, 259], "do_sample": True, "temperature": 0.3}
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == "{{ messages }}"
    directory = model_directory(tmp_path / "model.gguf")
    assert (directory / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    assert theirs("ab<|im_end|>")["input_ids"] == [258, 259]


@pytest.mark.parametrize(("adds", "expected"), [(True, [0, 258]), (False, [258])])
def test_whether_a_bos_is_added_is_what_the_file_says(adds, expected, tmp_path):
    writer_values = TOKENS | {"tokenizer.ggml.pre": "llama-bpe" if adds else "gpt-2"}  # the first adds one by itself
    write(tmp_path / "model.gguf", tensors(), writer_values)
    directory = model_directory(tmp_path / "model.gguf")
    assert transformers.AutoTokenizer.from_pretrained(directory)("ab")["input_ids"] == expected
    assert LlamaCpp(tmp_path / "model.gguf").tokenize("ab", add_special=True) == expected


@pytest.mark.parametrize(
    ("head_dim", "scaling"),
    [
        (128, {"rope_theta": 5e5, "factor": 8.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
        (64, {"rope_theta": 5e5, "factor": 32.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
        (128, {"rope_theta": 1e4, "factor": 4.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 4096}),
    ],
)
def test_rope_scaling_of_llama_3_is_found_from_its_factors(head_dim, scaling, tmp_path):
    parameters = {"rope_type": "llama3", "low_freq_factor": 1.0, **scaling}
    config = transformers.LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    unscaled = 1 / scaling["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    factors = (unscaled / scaled.double().numpy()).astype(np.float32)
    factors.tofile(tmp_path / "factors")
    size = head_dim // 2
    sizes = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 8 * head_dim,
        "llama.attention.head_count": 8,
        "llama.context_length": 131072,
        "llama.rope.freq_base": scaling["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    freqs = GgufTensor(tmp_path / "factors", Type.F32, (size,), 0, 4 * size)
    embedding = GgufTensor(tmp_path / "factors", Type.F32, (10, 8 * head_dim), 0, 0)
    header = GgufHeader([tmp_path / "model.gguf"], sizes, {"token_embd.weight": embedding, "rope_freqs.weight": freqs})
    found = config_json(header)["rope_parameters"]
    assert found.pop("rope_type") == parameters.pop("rope_type")
    assert found == pytest.approx(parameters, rel=1e-3)


def test_commands_take_a_gguf_file_for_a_directory(mixed, tmp_path, capsys):
    assert main(["from-gguf", str(mixed), str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 2
    for source, out in ((mixed, "file.npy"), (tmp_path / "model", "directory.npy")):
        assert nemoe(["logits", str(source), "--tokens", "3,200,77", "--out", str(tmp_path / out)]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "file.npy"), np.load(tmp_path / "directory.npy"))
    assert main(["gguf", str(mixed), str(tmp_path / "other.gguf"), "--type", "f32"]) == 0
    assert load_tokenizer(tmp_path / "other.gguf").encode("ab") == [258]


def test_a_file_that_changed_under_its_name_is_read_anew(mixed, plain, tmp_path):
    file = tmp_path / "model.gguf"
    seen = []
    for source in (mixed, plain, mixed):
        shutil.copy(source, file)
        os.utime(file, ns=(time.time_ns(), time.time_ns()))
        seen.append(load_pretrained(file)[1]["blocks"]["dense"]["ffn"]["up"])
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])


@pytest.mark.skipif("NEMOE_SMOLLM2_GGUF" not in os.environ, reason="wants the real file")
def test_smollm2_speaks_as_in_transformers(tmp_path):
    file = Path(os.environ["NEMOE_SMOLLM2_GGUF"])
    from_gguf(file, tmp_path / "model", FromGgufOptions(dtype="float32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = ours.generate(prompt, max_new_tokens=40, do_sample=False)
    assert torch.equal(output, theirs.generate(prompt, max_new_tokens=40, do_sample=False))
    assert "Paris" in tokenizer.decode(output[0, prompt.shape[1] :])
    text = "\n".join(TEXTS)
    assert load_tokenizer(file).encode(text) == LlamaCpp(file).tokenize(text, parse_special=False)
    shutil.rmtree(tmp_path / "model")
