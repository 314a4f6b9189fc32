"""T5Encoder and T5Tokenizer against transformers: T5EncoderModel, eager attention; T5Tokenizer."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.models.t5.modeling_t5 import T5Attention

from clip_jax.models import T5Encoder, functional
from clip_jax.params.shapes import flatten, unflatten
from clip_jax.t5_config import T5EncoderConfig
from clip_jax.tokenizers import T5Tokenizer
from tests.tokenizers.test_t5 import CHARACTER_MAP

pytestmark = pytest.mark.filterwarnings("ignore:Prompts of more than:UserWarning")

# torch and XLA add float32 products in different orders.
TOLERANCE = 2e-5

TINY = T5EncoderConfig(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=100)
OPTIONS = {
    "tiny": TINY,
    "heads wider than the model": dataclasses.replace(TINY, d_kv=12, num_heads=5),
    "one layer, one head": dataclasses.replace(TINY, num_layers=1, num_heads=1),
    "epsilon": dataclasses.replace(TINY, layer_norm_epsilon=1e-2),
    "buckets": dataclasses.replace(TINY, relative_attention_num_buckets=20, relative_attention_max_distance=50),
}


def torch_model(config, **changes):
    """Transformers' encoder with its own random weights, and norms and biases that are not all alike."""
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**config.to_hf() | changes))
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def params_of(model):
    """The weights of a torch model under the names of the removed FlaxT5EncoderModel."""
    flat = {}
    for key, tensor in model.state_dict().items():
        path, array = key.replace(".", "/"), tensor.float().numpy()
        match key.split(".")[-2]:
            case "embed_tokens":  # the same as `shared`
                continue
            case "shared" | "relative_attention_bias":
                flat[path.replace("/weight", "/embedding")] = array
            case "layer_norm" | "final_layer_norm":
                flat[path] = array
            case "q" | "k" | "v" | "o" | "wi_0" | "wi_1" | "wo":
                flat[path.replace("/weight", "/kernel")] = array.T
    return unflatten(flat)


def random_ids(rows, length, vocab_size=100):
    return np.random.default_rng(length).integers(0, vocab_size, (rows, length), dtype=np.int32)


def torch_outputs(model, ids, mask=None):
    with torch.no_grad():
        return model(
            torch.from_numpy(ids).long(),
            attention_mask=None if mask is None else torch.from_numpy(mask),
            output_hidden_states=True,
        )


def our_outputs(config, params, ids, mask=None, dtype=jnp.float32):
    model = T5Encoder(config, dtype)
    return jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, mask))(params, ids, mask)


# Outputs


def masks(ids):
    """No mask; pads at the end; and holes, with a row that is masked as a whole."""
    ends = np.array([[ids.shape[1]], [max(1, ids.shape[1] // 2)], [1]])
    holes = np.random.default_rng(0).integers(0, 2, ids.shape)
    holes[0] = 0
    return {
        "no mask": None,
        "pads": (np.arange(ids.shape[1]) < ends).astype(np.int64),
        "holes": holes.astype(np.int64),
    }


@pytest.mark.parametrize("length", [1, 7, 77, 256])
@pytest.mark.parametrize("option", OPTIONS)
def test_outputs(assert_parity, option, length):
    config, ids = OPTIONS[option], random_ids(3, length)
    model = torch_model(config)
    for mask in masks(ids).values():
        reference = torch_outputs(model, ids, mask)
        ours = our_outputs(config, params_of(model), ids, mask)
        assert len(ours.hidden_states) == len(reference.hidden_states) == config.num_layers + 1
        for mine, theirs in zip(ours.hidden_states, reference.hidden_states, strict=True):
            assert_parity(mine, theirs, TOLERANCE, "t5 tiny: hidden states")
        assert_parity(ours.last_hidden_state, reference.last_hidden_state, TOLERANCE, "t5 tiny: last_hidden_state")


def test_outputs_of_24_layers(assert_parity):
    """The shape of T5 v1.1 large."""
    config = T5EncoderConfig(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, vocab_size=100)
    ids, model = random_ids(2, 77), torch_model(config)
    reference = torch_outputs(model, ids).last_hidden_state.numpy()
    params = params_of(model)
    assert_parity(
        our_outputs(config, params, ids).last_hidden_state,
        reference,
        TOLERANCE,
        "t5 large: last_hidden_state",
    )


def test_the_table_has_every_parameter():
    model = torch_model(TINY)
    theirs = {path: array.shape for path, array in flatten(params_of(model)).items()}
    variables = jax.eval_shape(T5Encoder(TINY).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert {path: leaf.shape for path, leaf in flatten(variables["params"]).items()} == theirs


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (33, 100), (4, 2), (40, 300)])
def test_position_buckets(num_buckets, max_distance):
    relative = np.arange(-2000, 2001)
    np.testing.assert_array_equal(
        functional.relative_position_buckets(relative, num_buckets, max_distance),
        T5Attention._relative_position_bucket(torch.from_numpy(relative), True, num_buckets, max_distance),
    )


def test_config_is_read_by_transformers():
    theirs = transformers.T5Config(**TINY.to_hf())
    assert (theirs.dense_act_fn, theirs.is_gated_act) == ("gelu_new", True)
    assert T5EncoderConfig.from_hf(theirs.to_dict()) == TINY
    assert T5EncoderConfig.from_hf(json.loads(theirs.to_json_string())) == TINY


# The comparison fails where it should


def assert_disagree(assert_parity, params, ids):
    reference = torch_outputs(torch_model(TINY), ids).last_hidden_state
    with pytest.raises(AssertionError, match="max abs error"):
        assert_parity(our_outputs(TINY, params, ids).last_hidden_state, reference, TOLERANCE)


@pytest.fixture
def tiny_params():
    return params_of(torch_model(TINY))


def test_the_comparison_catches_the_exact_gelu(assert_parity, tiny_params, monkeypatch, trace_anew):
    monkeypatch.setattr(functional, "activation", lambda x, _: jax.nn.gelu(x, approximate=False))
    trace_anew()
    assert_disagree(assert_parity, tiny_params, random_ids(3, 77))


def test_the_comparison_catches_scaled_attention(assert_parity, tiny_params, monkeypatch, trace_anew):
    attention = functional.biased_attention
    monkeypatch.setattr(functional, "biased_attention", lambda q, *rest: attention(q * 8**-0.5, *rest))
    trace_anew()
    assert_disagree(assert_parity, tiny_params, random_ids(3, 77))


def test_the_comparison_catches_a_bias_in_the_first_block_alone(assert_parity, tiny_params, monkeypatch, trace_anew):
    attention, blocks = functional.biased_attention, iter(range(2))  # the others are traced as one

    def once(query, key, value, bias, mask):
        return attention(query, key, value, bias if next(blocks) == 0 else 0 * bias, mask)

    monkeypatch.setattr(functional, "biased_attention", once)
    trace_anew()
    assert_disagree(assert_parity, tiny_params, random_ids(3, 77))
    assert next(blocks, None) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("block/1/layer/0/SelfAttention/q/kernel", "block/1/layer/0/SelfAttention/k/kernel"),
        ("block/0/layer/1/DenseReluDense/wi_0/kernel", "block/0/layer/1/DenseReluDense/wi_1/kernel"),
        ("block/2/layer/0/layer_norm/weight", "block/2/layer/1/layer_norm/weight"),
        ("block/2/layer/1/layer_norm/weight", "final_layer_norm/weight"),
    ],
)
def test_the_comparison_catches_swapped_weights(assert_parity, tiny_params, one, other):
    flat = flatten(tiny_params)
    one, other = f"encoder/{one}", f"encoder/{other}"
    flat[one], flat[other] = flat[other], flat[one]
    assert_disagree(assert_parity, unflatten(flat), random_ids(3, 77))


# Half precision


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_is_near_that_of_torch(tmp_path, name):
    torch_model(TINY).save_pretrained(tmp_path)
    model = transformers.T5EncoderModel.from_pretrained(
        tmp_path, dtype=getattr(torch, name), attn_implementation="eager"
    ).eval()
    ids = random_ids(3, 77)
    reference, exact = torch_outputs(model, ids), torch_outputs(model.float(), ids).last_hidden_state.numpy()
    ours = our_outputs(TINY, params_of(model), ids, dtype=jnp.dtype(name))
    dtypes = [str(h.dtype).removeprefix("torch.") for h in reference.hidden_states]
    assert [str(h.dtype) for h in ours.hidden_states] == dtypes
    assert dtypes == (["bfloat16"] * 4 if name == "bfloat16" else ["float16", *["float32"] * 2, "float16"])
    error, theirs = (
        np.linalg.norm(np.asarray(x, np.float32) - exact) / np.linalg.norm(exact)
        for x in (ours.last_hidden_state, reference.last_hidden_state.float())
    )
    assert error < 1.5 * theirs
    assert theirs < (0.03 if name == "bfloat16" else 0.003)


# Tokenizer

WORDS = [
    *("a", "cat", "Cat", "castle", "photo", "of", "the", "hill", "12", "3.5", "(best quality:1.3)", "it's"),
    *("café", "cafe\u0301", "ﬁne", "Ａ", "①", "½", "…", "e", "", "!", "<", "_", "▁", "a▁b"),
    *("</s>", "<pad>", "<unk>", "<extra_id_7>", "猫咪", "日本語の", "Привет", "İ", "😀"),
    *("👨\u200d👩\u200d👧", "\u200b", "\u00ad", "\0", "\u0001", "\ufeff"),
]
SPACES = [" ", "", "  ", "\n", "\t", "\r\n", " \n ", "\u00a0", "\u3000", "    "]
CORPUS = [
    "a photo of the cat on a hill, painting by an artist in the style of 12 castles",
    "the castle (best quality:1.3) in red, green and blue; it's a café by the sea!",
    "an old man reads 34 books of photos: cats, dogs, hills and painted castles",
]


def generated_prompts():
    """1,200 prompts of words and white space of every kind, and of random characters."""
    rng = random.Random(0)
    prompts = ["", " ", "\n\n", "cat", " cat ", "cat" * 300, "a cat " * 300]
    for _ in range(800):
        count = rng.randint(1, 40)
        prompts.append("".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(count)))
    for _ in range(400):
        top = rng.choice([0x80, 0x250, 0x3100, 0xD800, 0x20000])
        characters = (chr(rng.randrange(top)) for _ in range(rng.randint(1, 40)))
        prompts.append("".join(c for c in characters if not "\ud800" <= c <= "\udfff"))
    return prompts


@pytest.fixture(scope="module")
def unigram():
    """A small vocabulary, trained under the normaliser and the pre-tokeniser of T5."""
    pipeline = Tokenizer(models.Unigram())
    pipeline.normalizer = normalizers.Precompiled(CHARACTER_MAP)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    pipeline.train_from_iterator(CORPUS * 20, trainer)
    return [tuple(piece) for piece in json.loads(pipeline.to_str())["model"]["vocab"]]


@pytest.fixture(scope="module")
def folder(unigram, tmp_path_factory):
    """A tokenizer folder as transformers 5 writes it."""
    folder = tmp_path_factory.mktemp("t5")
    transformers.T5Tokenizer(
        vocab=unigram, _spm_precompiled_charsmap=CHARACTER_MAP, model_max_length=512
    ).save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    return folder


def assert_same_tokenizer(ours, reference):
    # Before any call: transformers stores padding and truncation in its pipeline when it is called.
    assert json.loads(ours._pipeline.to_str()) == json.loads(reference.backend_tokenizer.to_str())
    assert (ours.pad_token, ours.pad_token_id) == (reference.pad_token, reference.pad_token_id)
    assert (ours.eos_token_id, ours.vocab_size) == (reference.eos_token_id, len(reference))
    assert_same_ids(ours, reference, [1, 2, 7, 77, 512])


def assert_same_ids(ours, reference, lengths):
    prompts = generated_prompts()
    for length in lengths:
        theirs = reference(prompts, padding="max_length", max_length=length, truncation=True).input_ids
        mine = ours.encode(prompts, max_length=length, overflow="truncate")
        np.testing.assert_array_equal(mine, np.asarray(theirs, np.int32))


@pytest.mark.parametrize("loader", [transformers.AutoTokenizer, transformers.T5Tokenizer])
def test_ids(folder, loader):
    assert_same_tokenizer(T5Tokenizer.from_folder(folder), loader.from_pretrained(folder))


def test_ids_of_a_folder_that_transformers_4_wrote(folder, tmp_path):
    """With its split into words, a truncation, and special tokens in files of their own."""
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    steps = [whole["normalizer"], {"type": "Strip", "strip_left": False, "strip_right": True}, spaces]
    whole |= {"pre_tokenizer": scheme, "normalizer": {"type": "Sequence", "normalizers": steps}}
    whole["truncation"] = {
        "direction": "Right",
        "max_length": 9,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {**special, "extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "spiece.model").write_bytes(b"not read")
    ours, reference = T5Tokenizer.from_folder(tmp_path), transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert (ours.model_max_length, ours.vocab_size) == (512, len(reference))
    assert_same_ids(ours, reference, [7, 512])


def test_transformers_reads_what_we_save(folder, tmp_path):
    T5Tokenizer.from_folder(folder).save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(reference, transformers.T5Tokenizer)
    assert reference.model_max_length == 512
    assert_same_tokenizer(T5Tokenizer.from_folder(tmp_path), reference)


def test_ids_of_sentencepiece(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        minloglevel=2,
    )
    reference = transformers.T5Tokenizer.from_pretrained(tmp_path)
    ours = T5Tokenizer.from_folder(tmp_path)
    assert_same_ids(ours, reference, [7, 512])
    ours.save(tmp_path / "saved")
    assert_same_ids(T5Tokenizer.from_folder(tmp_path / "saved"), reference, [77])


def test_the_comparison_catches_a_missing_character_map(folder):
    ours = T5Tokenizer.from_folder(folder)
    ours._pipeline.normalizer = normalizers.NFC()
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        assert_same_ids(ours, transformers.T5Tokenizer.from_pretrained(folder), [77])
