"""GGUF files against llama.cpp itself: the same logits, the same greedy text, the same token ids, the same chats."""

import errno
import json
import os
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

llama_cpp = pytest.importorskip("xllamacpp")
mistral_common = pytest.importorskip("mistral_common")

import gguf
import sentencepiece
from conftest import DENSE, NEKOMIND
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from convert.cli import main
from convert.gguf import GgufOptions, to_gguf
from convert.gguf_tokenizer import PRE_TOKENIZERS
from nemoe_jax import hf
from nemoe_jax.chat import render_chat
from nemoe_jax.checkpoint import Checkpoint
from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.generate import generate
from nemoe_jax.schema import declare, leaves, unflatten
from nemoe_jax.tekken import read_json
from nemoe_jax.tokenizer import cut_tekken, load_tokenizer
from nemoe_jax.transformer import forward

DATA = Path(mistral_common.__file__).parent / "data"
COMMON = {
    "hidden": 64,
    "layers": 2,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 32,
    "vocab": 1400,
    "rope_theta": 3e4,
    "norm_eps": 1e-3,
    "context": 256,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "dense": ModelConfig(family="mistral", ffn=96, **COMMON),
    "tied": ModelConfig(family="llama", ffn=96, tied=True, **COMMON),
    "moe": ModelConfig(family="mixtral", experts=5, top_k=3, expert_ffn=32, **COMMON),
}
PROMPT = [1, 300, 1200, 30, 500, 77]
NEW_TOKENS = 48
TEXTS = [
    "def f(x):\n    return {k: v for k, v in x}  # comment\n\n\tprint(f'{x:>3}')\r\n",
    "Straße, Übergrößenträger; ÄÖÜ äöü ß – „Zitat“ und ÄnderungÜber",
    "人人生而自由,在尊严和权利上一律平等。",
    "emoji 😀👨‍👩‍👧 🇩🇪",
    "  leading   and    many     spaces \n\n\n \n and\ttabs\t\t ",
    "1234567890 3.14159 1,000,000 2²",
    "camelCase HTTPServer don't WE'RE snake_case/path//x",
    "spelled out: <s> </s> [INST] x [/INST]",
    " ",
    "\n",
]


def random_params(config: ModelConfig):
    """Weights of twice the usual size and norms that are not ones, so that the likeliest token stands out."""
    random = np.random.default_rng(0)
    specs = leaves(declare(config))
    return unflatten(
        {
            path: (
                random.normal(0, 0.3, spec.shape) + 1
                if spec.std is None
                else random.normal(0, 1, spec.shape) * 2 * spec.std
            ).astype(np.float32)
            for path, spec in specs.items()
        }
    )


def save(directory: Path, config: ModelConfig):
    params = random_params(config)
    hf.save(directory, config, params)
    return params


class LlamaCpp:
    """llama.cpp's server in this process, on the CPU, with caches in float32."""

    def __init__(self, path: Path):
        params = llama_cpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_gpu_layers, params.cpuparams.n_threads = 256, 0, 1
        params.warmup, params.verbosity = False, -1
        params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = llama_cpp.Server(params)

    def post(self, path: str, **body):
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokenize(self, text: str, **options) -> list[int]:
        return self.post("/tokenize", content=text, **options)["tokens"]

    def chat(self, messages) -> list[int]:
        prompt = self.post("/apply-template", messages=messages)["prompt"]
        return self.tokenize(prompt, add_special=True, parse_special=True)

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        answer = self.post(
            "/completion", prompt=prompt, n_predict=new_tokens, temperature=0, ignore_eos=True, return_tokens=True
        )
        return answer["tokens"]

    def log_probabilities(self, prompt: list[int], vocab: int) -> np.ndarray:
        """Of the token after the prompt, (V,)."""
        letter = [[20 + ord("a"), 1000]]  # half a character or an end token would come without its probabilities
        answer = self.post("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=vocab, logit_bias=letter)
        rows = answer["completion_probabilities"][0]["top_logprobs"]
        by_token = {row["id"]: row["logprob"] for row in rows}
        assert len(by_token) == vocab
        return np.array([by_token[token] for token in range(vocab)])


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(config, parameters, directory) of a random model with a tokenizer smaller than its embedding."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    config = MODELS[request.param]
    params = save(directory, config)
    cut_tekken(DATA / "tekken_240718.json", directory / "tekken.json", 1300)
    return config, params, directory


def test_llama_cpp_continues_as_we_do(model, tmp_path):
    config, params, directory = model
    to_gguf(directory, tmp_path / "model.gguf", GgufOptions())
    theirs = LlamaCpp(tmp_path / "model.gguf")
    params = jax.tree.map(jnp.asarray, params)
    ours = [int(token) for (token,) in generate(config, params, [PROMPT], NEW_TOKENS)]
    assert theirs.greedy(PROMPT, NEW_TOKENS) == ours
    tokens = PROMPT + ours
    logits_TV = forward(config, params, jnp.asarray([tokens])).logits[0]
    expected_V = jax.nn.log_softmax(logits_TV[-1])
    np.testing.assert_allclose(theirs.log_probabilities(tokens, config.vocab), expected_V, atol=2e-4)


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 0.1), ("f16", 0.02), ("q8_0", 0.6)])
def test_other_types_are_near(kind, tolerance, moe, tmp_path):
    to_gguf(moe, tmp_path / "exact.gguf", GgufOptions())
    to_gguf(moe, tmp_path / "model.gguf", GgufOptions(type=kind))
    exact_V, near_V = (
        LlamaCpp(tmp_path / f"{name}.gguf").log_probabilities(PROMPT, COMMON["vocab"]) for name in ("exact", "model")
    )
    assert 0 < np.abs(near_V - exact_V).max() < tolerance


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_tensors_are_the_source_s_own(kind, moe, tmp_path):
    """Bit for bit; q8_0 within half a step of its blocks of 32, and the rounding of the step to float16."""
    to_gguf(moe, tmp_path / "model.gguf", GgufOptions(type=kind))
    config, source = MODELS["moe"], Checkpoint(moe)
    dtype = np.dtype({"f16": np.float16, "bf16": ml_dtypes.bfloat16}.get(kind, np.float32))
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}

    def check(name: str, values: np.ndarray, exact: bool = False) -> None:
        tensor = written.pop(name)
        assert tuple(tensor.shape) == values.shape[::-1], name
        if exact or kind == "f32":
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, name
            np.testing.assert_array_equal(tensor.data, values)
        elif kind == "q8_0":
            blocks = values.reshape(-1, 32)
            off = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32) - blocks
            assert (np.abs(off) <= 0.57 * np.abs(blocks).max(axis=1, keepdims=True) / 127).all(), name
        else:
            np.testing.assert_array_equal(
                tensor.data.view(np.uint16).ravel(), values.astype(dtype).view(np.uint16).ravel()
            )

    check("token_embd.weight", source.view("model.embed_tokens.weight"))
    check("output_norm.weight", source.view("model.norm.weight"), exact=True)
    check("output.weight", source.view("lm_head.weight"))
    for layer in range(config.layers):
        prefix, name = f"model.layers.{layer}.", f"blk.{layer}."
        for heads, theirs, ours in ((config.heads, "attn_q", "q"), (config.kv_heads, "attn_k", "k")):
            rows = source.view(f"{prefix}self_attn.{ours}_proj.weight")
            half = config.head_dim // 2
            order = [head * 2 * half + i + side * half for head in range(heads) for i in range(half) for side in (0, 1)]
            check(f"{name}{theirs}.weight", rows[order])
        check(f"{name}attn_v.weight", source.view(f"{prefix}self_attn.v_proj.weight"))
        check(f"{name}attn_output.weight", source.view(f"{prefix}self_attn.o_proj.weight"))
        check(f"{name}attn_norm.weight", source.view(f"{prefix}input_layernorm.weight"), exact=True)
        check(f"{name}ffn_norm.weight", source.view(f"{prefix}post_attention_layernorm.weight"), exact=True)
        check(f"{name}ffn_gate_inp.weight", source.view(f"{prefix}block_sparse_moe.gate.weight"), exact=True)
        for theirs, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            keys = [f"{prefix}block_sparse_moe.experts.{expert}.{ours}.weight" for expert in range(config.experts)]
            check(f"{name}ffn_{theirs}_exps.weight", np.stack([source.view(key) for key in keys]))
    assert not written


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """A Mixtral directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("moe") / "model"
    save(directory, MODELS["moe"])
    cut_tekken(DATA / "tekken_240718.json", directory / "tekken.json", COMMON["vocab"])
    return directory


def tokenizer_json(pre_tokenizer, **options) -> Library:
    """A byte-level BPE with control tokens and one ordinary added token."""
    library = Library(models.BPE(**options))
    library.pre_tokenizer, library.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    library.train_from_iterator(TEXTS[:7] * 4, trainer)
    library.add_tokens(["<think>"])
    return library


def split_by(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TEKKEN, LLAMA3, _ = PRE_TOKENIZERS
TOKENIZERS = {
    "tekken": lambda directory: cut_tekken(DATA / "tekken_240718.json", directory / "tekken.json", 6000),
    "tekken-v7": lambda directory: write_version(directory / "tekken.json", "v7"),
    "v1": lambda directory: copy(DATA / "tokenizer.model.v1", directory / "tokenizer.model.v1"),
    "v3": lambda directory: copy(DATA / "mistral_instruct_tokenizer_240323.model.v3", directory / "tokenizer.model.v3"),
    "v7": lambda directory: copy(DATA / "mistral_instruct_tokenizer_241114.model.v7", directory / "tokenizer.model.v7"),
    "gpt-2": lambda directory: tokenizer_json(pre_tokenizers.ByteLevel(add_prefix_space=False)).save(
        str(directory / "tokenizer.json")
    ),
    "llama-bpe": lambda directory: tokenizer_json(split_by(LLAMA3)).save(str(directory / "tokenizer.json")),
    "tekken-json": lambda directory: tokenizer_json(split_by(TEKKEN)).save(str(directory / "tokenizer.json")),
}


def copy(source: Path, destination: Path) -> None:
    destination.write_bytes(source.read_bytes())


def write_version(path: Path, version: str) -> None:
    cut_tekken(DATA / "tekken_240718.json", path, 6000)
    spec = read_json(path)
    spec["config"]["version"] = version
    path.write_text(json.dumps(spec))


def small_model(directory: Path, vocab: int, **changes) -> None:
    """A model as small as llama.cpp takes."""
    small = {"hidden": 32, "heads": 2, "kv_heads": 1, "layers": 1, "vocab": vocab, "ffn": 32}
    save(directory, MODELS["dense"].replace(**(small | changes)))


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizers(request, tmp_path_factory):
    """(ours, llama.cpp's) of each kind of tokenizer."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    TOKENIZERS[request.param](tmp_path_factory.getbasetemp() / f"{request.param}0")
    (file,) = (tmp_path_factory.getbasetemp() / f"{request.param}0").glob("t*")
    tokenizer = load_tokenizer(file)
    small_model(directory, tokenizer.vocab_size + 9)
    copy(file, directory / file.name)
    to_gguf(directory, directory / "model.gguf", GgufOptions())
    return load_tokenizer(directory), LlamaCpp(directory / "model.gguf")


def test_llama_cpp_gives_our_token_ids(tokenizers):
    ours, theirs = tokenizers
    texts = [*TEXTS, "a<think>b"]
    expected = {text: ours.encode(text) for text in texts}
    assert {text: theirs.tokenize(text, parse_special=False) for text in texts} == expected
    assert theirs.tokenize(texts[0], add_special=True) == ours.encode(texts[0], bos=True)


CHATS = [
    ["user: What is 2+2?"],
    ["system: Be brief.", "user: Hello"],
    ["user: Hi", "assistant: Hello there.", "user: And\n\nthen?"],
    ["system: One.", "system: Two.", "user: A", "user: B", "assistant: C", "user: D"],
    ["system: One.", "user: A", "assistant: B", "assistant: C", "user: D", "user: E"],
]


@pytest.mark.parametrize("chat", CHATS)
def test_llama_cpp_renders_our_chats(tokenizers, chat):
    ours, theirs = tokenizers
    messages = [dict(zip(("role", "content"), line.split(": ", 1), strict=True)) for line in chat]
    assert theirs.chat(messages) == render_chat(ours, messages)


def test_a_rewritten_sentencepiece_tokenizer_goes_by_its_original(tmp_path):
    """As ChatML models made from Mistral 7B: tokenizer.json, tokenizer.model, and added tokens in the former alone."""
    directory = tmp_path / "model"
    small_model(directory, 32010)
    copy(DATA / "tokenizer.model.v1", directory / "tokenizer.model")
    original = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    library = Library(models.BPE({original.id_to_piece(i): i for i in range(32000)}, [], byte_fallback=True))
    library.add_special_tokens(["<s>", "</s>", "<|im_start|>"])
    library.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    to_gguf(directory, tmp_path / "model.gguf", GgufOptions())
    theirs = LlamaCpp(tmp_path / "model.gguf")
    assert theirs.tokenize(TEXTS[1], parse_special=False) == original.encode(TEXTS[1])
    assert theirs.chat([{"role": "user", "content": "Hi there"}]) == [1, 32000, *original.encode("Hi there")]


def test_the_command_reports_and_a_dry_run_writes_nothing(moe, tmp_path, capsys):
    target = tmp_path / "new" / "model.gguf"
    command = ["gguf", str(moe), str(target), "--type", "q8_0", "--json"]
    assert main([*command, "--dry-run"]) == 0
    assert not target.parent.exists()
    planned = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == planned | {"written": True}
    header = target.stat().st_size - planned["gigabytes"] * 1e9
    assert 0 < header < 100_000
    assert planned["tokens"] == COMMON["vocab"]
    assert list(target.parent.iterdir()) == [target]


def break_tensor(directory: Path, value: float) -> None:
    """Writes a value into a weight file, where nothing checks it."""
    with_tekken(MODELS["dense"])(directory)
    (file,) = set(Checkpoint(directory).files.values())
    entry = file.entries["model.layers.1.self_attn.q_proj.weight"]
    with file.path.open("r+b") as opened:
        opened.seek(entry.offset + 4 * 777)
        opened.write(np.float32(value).tobytes())


def unigram(directory: Path) -> None:
    small_model(directory, 400)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 9), model_prefix=str(directory / "tokenizer"), vocab_size=110, minloglevel=2
    )


def normalising(directory: Path) -> None:
    small_model(directory, 600)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 9),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )


def json_with(pre_tokenizer):
    def make(directory: Path) -> None:
        small_model(directory, 700)
        tokenizer_json(pre_tokenizer).save(str(directory / "tokenizer.json"))

    return make


def with_tekken(config: ModelConfig, size: int = 1300):
    def make(directory: Path) -> None:
        save(directory, config)
        cut_tekken(DATA / "tekken_240718.json", directory / "tekken.json", size)

    return make


NOT_FINITE = r"model\.layers\.1\.self_attn\.q_proj\.weight: NaN or infinite values in"
ERRORS = {
    "nan": (lambda directory: break_tensor(directory, np.nan), "bf16", NOT_FINITE + " bf16"),
    "infinity": (lambda directory: break_tensor(directory, -np.inf), "q8_0", NOT_FINITE + " q8_0"),
    "overflow": (lambda directory: break_tensor(directory, 1e6), "f16", NOT_FINITE + " f16"),
    "nekomind": (with_tekken(NEKOMIND), "auto", "no architecture for NekoMind"),
    "no tokenizer": (lambda directory: save(directory, DENSE), "auto", "no tokenizer"),
    "narrow rows": (with_tekken(DENSE.replace(vocab=1300)), "q8_0", r"q8_0: model\.embed_tokens\.weight: .*24"),
    "too many tokens": (with_tekken(MODELS["dense"], 1401), "auto", "1401 tokens, but the embedding .* has 1400 rows"),
    "unigram": (unigram, "auto", "wants a SentencePiece model of type BPE"),
    "normalising": (normalising, "auto", "normalises text .nmt_nfkc."),
    "unknown pattern": (json_with(split_by(r"\w+")), "auto", r"no name for its way to cut words .*: \\w\+"),
    "not byte-level": (json_with(pre_tokenizers.Whitespace()), "auto", "wants a byte-level BPE"),
    "space prefix": (json_with(pre_tokenizers.ByteLevel(add_prefix_space=True)), "auto", "wants a byte-level BPE"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_llama_cpp_could_not_read_is_refused(case, tmp_path):
    make, kind, message = ERRORS[case]
    make(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        to_gguf(tmp_path / "model", tmp_path / "new" / "model.gguf", GgufOptions(type=kind))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_file_stays_as_it_is(moe, tmp_path, capsys):
    (tmp_path / "model.gguf").write_text("mine")
    assert main(["gguf", str(moe), str(tmp_path / "model.gguf")]) == 2
    assert "model.gguf: exists already" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing(moe, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left"):
        to_gguf(moe, tmp_path / "new" / "model.gguf", GgufOptions())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("nemoe_jax.writer.free_bytes", lambda target: 1000)
    with pytest.raises(UserError, match="GB of disk"):
        to_gguf(moe, tmp_path / "model.gguf", GgufOptions())
