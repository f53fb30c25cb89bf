"""Text encoders on tiny random models, with tokenizers trained or written here: nothing is downloaded."""

import io
import json
import math
import shutil
import socket
import sys

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from fastlatent.encoders.text import BATCH_SIZE, WEIGHTS, load_text_encoder
from fastlatent.store.records import Field

CAPTIONS = [
    "a photo of a cat",
    "",
    "träge Züge, 日本語, 🐈, zero\u200bwidth, e\u0301",
    "one\ttwo\nthree  four",
    "cat " * 40,  # longer than every max_length here
]
SENTENCES = ["a photo of a cat on a mat", "the quick brown fox jumps over the lazy dog", "hello world 0123456789"]
LENGTHS = {"clip": 12, "projected": 12, "t5": 16, "umt5": 16}
CLASSES = {
    "clip": CLIPTextModel,
    "projected": CLIPTextModelWithProjection,
    "t5": T5EncoderModel,
    "umt5": UMT5EncoderModel,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_clip_tokenizer(folder):
    letters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12})
    )
    return len(tokens)


def write_t5_tokenizer(folder):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "model_max_length": 16, "extra_ids": 4})
    )


def t5_config(cls=T5Config):
    return cls(
        vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    made = {name: root / name for name in CLASSES}
    torch.manual_seed(0)
    for name, folder in made.items():
        folder.mkdir()
        if name in ("t5", "umt5"):
            write_t5_tokenizer(folder)
            if name == "umt5":  # published with both files; AutoTokenizer makes nothing of its spiece.model alone
                T5Tokenizer.from_pretrained(folder).save_pretrained(folder)
            model = CLASSES[name](t5_config(T5Config if name == "t5" else UMT5Config))
        else:
            vocabulary = write_clip_tokenizer(folder)
            model = CLASSES[name](
                CLIPTextConfig(
                    vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, projection_dim=8,
                    num_attention_heads=2, max_position_embeddings=12, bos_token_id=vocabulary - 2,
                    eos_token_id=2 if name == "clip" else vocabulary - 1, pad_token_id=vocabulary - 1,
                )
            )  # fmt: skip
        model.save_pretrained(folder)
    return made


@pytest.fixture(params=list(CLASSES))
def name(request):
    return request.param


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def edit_json(file, **values):
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "remove"}))


def edit_weights(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def same(one, other):
    pooled = one.pooled is other.pooled is None or torch.equal(one.pooled, other.pooled)
    return torch.equal(one.tokens, other.tokens) and pooled


def test_equals_the_plain_call(folders, name):
    length, clip = LENGTHS[name], "t5" not in name
    encoder = load_text_encoder(folders[name])
    got = encoder.encode(CAPTIONS)
    tokenizer, model = AutoTokenizer.from_pretrained(folders[name]), CLASSES[name].from_pretrained(folders[name])
    rows = CAPTIONS + [""] * (BATCH_SIZE - len(CAPTIONS))
    inputs = tokenizer(rows, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        if clip:
            want = model.eval()(inputs["input_ids"])
            pooled = want.text_embeds if name == "projected" else want.pooler_output
        else:
            want = model.eval()(**inputs)
    for i, one in enumerate(got):
        count = length if clip else int(inputs["attention_mask"][i].sum())
        assert torch.equal(one.tokens, want.last_hidden_state[i, :count])
        assert one.tokens.dtype == torch.float32 and not one.tokens.requires_grad
        assert torch.equal(one.pooled, pooled[i]) if clip else one.pooled is None
    assert encoder.truncated == sum(len(ids) > length for ids in tokenizer(CAPTIONS)["input_ids"]) >= 1
    width = {"clip": 16, "projected": 8}
    text = Field("text", "F16", (12, 16) if clip else (-1, 16))
    assert encoder.columns == ((text, Field("text_pooled", "F16", (width[name],))) if clip else (text,))
    assert [len(one.tokens) for one in got][1] == (12 if clip else 1)  # the empty caption of T5: </s>


def test_neighbours_change_nothing(folders, name):
    encoder = load_text_encoder(folders[name])
    many = (CAPTIONS * 4)[: BATCH_SIZE + 1]  # a full pass, and one with a single row
    together = encoder.encode(many)
    alone = [encoder.encode([caption])[0] for caption in CAPTIONS]
    assert len(together) == len(many)
    assert all(same(one, alone[i % len(CAPTIONS)]) for i, one in enumerate(together))
    # No row has padding here: a mask that transformers may leave out.
    assert same(encoder.encode([CAPTIONS[4], *["fox " * 40] * (BATCH_SIZE - 1)])[0], alone[4])
    assert encoder.encode([]) == []
    # Own memory: a slice would keep the whole batch.
    assert all(one.tokens.untyped_storage().nbytes() == one.tokens.nbytes for one in together)


def test_truncation_is_counted(folders):
    encoder = load_text_encoder(folders["t5"])
    one = len(encoder.tokenizer("cat")["input_ids"]) - 1  # tokens of a word
    fits, longer = "cat " * ((16 - 1) // one), "cat " * ((16 - 1) // one + 1)
    encoder.encode([fits])
    assert encoder.truncated == 0
    encoder.encode([longer, fits, longer + "dog"])
    assert encoder.truncated == 2
    long = encoder.encode(["cat " * 25_000])[0]
    assert (len(long.tokens), encoder.truncated) == (16, 3)


def test_max_length(folders):
    assert load_text_encoder(folders["t5"]).max_length == 16  # 256 at most, and what the tokenizer allows
    short = load_text_encoder(folders["t5"], max_length=5)
    assert len(short.encode(["the quick brown fox"])[0].tokens) == 5
    assert short.identity() != load_text_encoder(folders["t5"]).identity()
    clip = load_text_encoder(folders["clip"], max_length=5)
    assert clip.encode(["cat"])[0].tokens.shape == (5, 16)
    assert clip.columns[0] == Field("text", "F16", (5, 16))
    for name, wrong, least, most in (("t5", 17, 2, 16), ("t5", 1, 2, 16), ("clip", 13, 3, 12), ("clip", 2, 3, 12)):
        with pytest.raises(ValueError, match=f"expected a max_length from {least} to {most}, got {wrong}"):
            load_text_encoder(folders[name], max_length=wrong)


def test_t5_default_where_the_tokenizer_allows_more(copied):
    folder = copied("t5")
    edit_json(folder / "tokenizer_config.json", model_max_length="remove")
    assert load_text_encoder(folder).max_length == 256


def test_dtypes(folders, name):
    full, half = (load_text_encoder(folders[name], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(full.encode(CAPTIONS), half.encode(CAPTIONS), strict=True):
        assert other.tokens.dtype == torch.float32
        torch.testing.assert_close(one.tokens, other.tokens, rtol=0.1, atol=0.1)
        assert not same(one, other)
    assert full.identity() == half.identity()  # the dtype it runs in is not part of what it is


def test_t5_overflow(copied):
    folder = copied("t5")
    with pytest.raises(ValueError, match="T5's activations overflow float16; run it in bfloat16 or float32"):
        load_text_encoder(folder, dtype=torch.float16)
    # What happens in published ones: the sum along the residual path leaves float16's range, 65504.
    edit_weights(folder, lambda state: {k: v * 1e5 if k == "shared.weight" else v for k, v in state.items()})
    for dtype in (torch.float32, torch.bfloat16):
        assert load_text_encoder(folder, dtype=dtype).encode(["cat"])[0].tokens.abs().max() < 100


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_what_float16_cannot_hold(copied, value):
    folder = copied("clip")
    key = next(k for k in load_file(folder / WEIGHTS) if k.endswith("final_layer_norm.bias"))
    edit_weights(folder, lambda state: state | {key: torch.full_like(state[key], value)})
    with pytest.raises(ValueError, match="the embedding of 'cat' holds NaN or numbers beyond ±65504"):
        load_text_encoder(folder).encode(["cat"])


@pytest.mark.parametrize("caption", ["a \udcff", None, b"cat", 7])
def test_captions_that_are_no_text(folders, caption):
    with pytest.raises(ValueError, match="expected captions of Unicode text, got"):
        load_text_encoder(folders["clip"]).encode(["cat", caption])


def test_identity(folders, copied, name):
    def identity():
        return load_text_encoder(folder).identity()

    folder = copied(name)
    want = identity()
    assert json.loads(json.dumps(want)) == want == load_text_encoder(folders[name]).identity()
    assert want["class"] == CLASSES[name].__name__ and str(folder) not in json.dumps(want)
    edit_json(folder / "config.json", transformers_version="0", _name_or_path="x", torch_dtype="float16")
    assert identity() == want
    edit_json(folder / "tokenizer_config.json", model_max_length=11)
    assert {k for k in want if identity()[k] != want[k]} == {"tokenizer", "max_length"}
    edit_json(folder / "tokenizer_config.json", model_max_length=LENGTHS[name])

    def flip(state):
        state[sorted(state)[0]].view(torch.int32).view(-1)[3] ^= 1
        return state

    changed_only = identity()["tokenizer"]
    edit_weights(folder, flip)
    got = identity()
    assert got["weights"] != want["weights"]
    assert (got["config"], got["tokenizer"]) == (want["config"], changed_only)


def test_weights_in_several_files(folders, tmp_path):
    folder = tmp_path / "shards"
    T5EncoderModel.from_pretrained(folders["t5"]).save_pretrained(folder, max_shard_size="6KB")
    for file in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(folders["t5"] / file, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    shards, whole = (load_text_encoder(one) for one in (folder, folders["t5"]))
    assert shards.identity()["weights"] == whole.identity()["weights"]
    assert same(shards.encode(["cat"])[0], whole.encode(["cat"])[0])
    next(iter(folder.glob("*.safetensors"))).unlink()
    with pytest.raises(ValueError, match=r"index.json names \['model-0.*, not there"):
        load_text_encoder(folder)


def test_the_encoder_of_a_whole_t5(copied):
    folder = copied("t5")
    want = load_text_encoder(folder)
    torch.manual_seed(1)
    whole = T5ForConditionalGeneration(t5_config())
    whole.encoder.load_state_dict(want.model.encoder.state_dict())
    whole.shared.load_state_dict(want.model.shared.state_dict())
    whole.save_pretrained(folder)
    got = load_text_encoder(folder)
    assert got.identity()["class"] == "T5EncoderModel"
    assert got.identity()["weights"] == want.identity()["weights"]
    assert same(got.encode(["cat"])[0], want.encode(["cat"])[0])


def test_layout_of_a_pipeline(folders, tmp_path):
    """text_encoder_2 and tokenizer_2 beside each other, and the tensor that the first CLIP files hold besides."""
    encoder, tokenizer = tmp_path / "text_encoder_2", tmp_path / "tokenizer_2"
    encoder.mkdir(), tokenizer.mkdir()
    for file in folders["clip"].iterdir():
        shutil.copy(file, encoder if file.name in ("config.json", WEIGHTS) else tokenizer)
    edit_weights(encoder, lambda state: state | {"text_model.embeddings.position_ids": torch.arange(12)[None]})
    want = load_text_encoder(folders["clip"])
    for path in (encoder, f"{encoder}/"):
        got = load_text_encoder(path)
        assert same(got.encode(["cat"])[0], want.encode(["cat"])[0])
        assert got.identity()["tokenizer"] == want.identity()["tokenizer"]
    shutil.rmtree(tokenizer)
    with pytest.raises(
        ValueError, match="tokenizer.json, or vocab.json and merges.txt in .*text_encoder_2 or .*tokenizer_2"
    ):
        load_text_encoder(encoder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("clip", lambda path: edit_json(path / "config.json", architectures=["BertModel"]), "architectures .'Bert"),
        ("clip", lambda path: edit_json(path / "config.json", architectures=["CLIPModel"]), "save_pretrained"),
        ("clip", lambda path: edit_json(path / "config.json", architectures="remove"), "got architectures None"),
        ("clip", lambda path: (path / "config.json").write_text("[]"), "expected a JSON object"),
        ("clip", lambda path: (path / "config.json").write_bytes(b"\xff{"), "is not JSON"),
        ("clip", lambda path: (path / "config.json").unlink(), "expected config.json in"),
        ("clip", lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"), "expected model.safetensors or"),
        ("clip", lambda path: (path / WEIGHTS).write_bytes(b""), "does not load"),
        ("clip", lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1]), "does not load"),
        ("clip", lambda path: edit_weights(path, lambda s: dict(list(s.items())[1:])), "missing_keys"),
        ("clip", lambda path: edit_weights(path, lambda s: s | {"more": torch.zeros(1)}), "unexpected_keys"),
        ("clip", lambda path: edit_json(path / "config.json", hidden_size=8), "do(es)? not"),
        ("t5", lambda path: edit_json(path / "config.json", d_ff=8), "do(es)? not"),
        ("clip", lambda path: (path / "merges.txt").unlink(), "tokenizer.json, or vocab.json and merges"),
        ("clip", lambda path: (path / "vocab.json").write_text("{"), "the tokenizer in .* does not load"),
        ("t5", lambda path: (path / "spiece.model").unlink(), "the tokenizer's tokenizer.json, or spiece.model"),
        ("t5", lambda path: (path / "spiece.model").write_bytes(b"no model"), "the tokenizer in .* does not load"),
        # A tokenizer with other ids than the model was trained on.
        ("projected", lambda path: edit_json(path / "tokenizer_config.json", eos_token="a"), "whose eos_token has"),
        ("t5", lambda path: edit_json(path / "tokenizer_config.json", extra_ids=100), "at most 128 tokens"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit(copied, name, change, message):
    folder = copied(name)
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_text_encoder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_of_the_folder_is_not_run(copied):
    folder = copied("clip")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    (folder / "own.py").write_text(
        f"open({str(folder / 'it ran')!r}, 'w')\nfrom transformers import CLIPTokenizer as Own\n"
    )
    with pytest.raises(ValueError, match="the tokenizer in .* does not load"):
        load_text_encoder(folder)
    assert not (folder / "it ran").exists()


@pytest.mark.parametrize("path", ["openai/clip-vit-large-patch14", "https://host/model", __file__])
def test_remote_names_are_refused(path):
    with pytest.raises(ValueError, match=f"expected a local folder, got .*{path[-9:]}: nothing is downloaded"):
        load_text_encoder(path)


def test_without_transformers(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'fastlatent\[text\]'"):
        load_text_encoder(folders["clip"])


@pytest.mark.needs_cuda
def test_on_the_gpu(folders, name):
    here, there = (load_text_encoder(folders[name], device) for device in ("cpu", "cuda"))
    for one, other in zip(here.encode(CAPTIONS), there.encode(CAPTIONS), strict=True):
        assert other.tokens.device.type == "cpu"
        torch.testing.assert_close(one.tokens, other.tokens, rtol=1e-2, atol=1e-2)
    assert all(map(same, there.encode(CAPTIONS), [there.encode([caption])[0] for caption in CAPTIONS]))
