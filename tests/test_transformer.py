"""The decoder against `transformers` (tiny random models of each family), and its files, packing and dtypes."""

import copy
import dataclasses
import inspect
import json
import math
import os
import pathlib
import shutil
import weakref
from pathlib import Path
from unittest.mock import ANY

from kernels import transformer
from kernels.sampler import Sampler
from kernels.transformer import Config, load_model, packed_attention, rotary_angles, save_model

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
TRAINED = {"original_max_position_embeddings": 32, "rope_theta": 500.0}


def reference_model(config_class, **options):
    """A tiny `transformers` model in which every parameter matters: its own init has zero biases and unit norms."""
    config = config_class(**copy.deepcopy(SIZES | options), attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.2, generator=generator).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


@pytest.fixture
def qwen3(tmp_path):
    """(reference, directory) of one Qwen3 with grouped queries, head size 12 rather than 32 / 4, and its own head."""
    reference = reference_model(Qwen3Config, head_dim=12)
    reference.save_pretrained(tmp_path / "qwen3")
    return reference, tmp_path / "qwen3"


def edit_config(path, **changes):
    """Change `config.json` in place; a value of None removes the key."""
    raw = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def to_old_layout(path):
    """Rewrite a directory as older versions wrote it: rope at the top level, torch_dtype, duplicate tensors."""
    rope = json.loads((path / "config.json").read_text())["rope_parameters"]
    theta, scaling = rope.pop("rope_theta"), {"type": rope.pop("rope_type"), **rope}
    edit_config(path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling if rope else None)
    edit_config(path, dtype=None, torch_dtype="float32", layer_types=None)
    weights = load_file(path / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def close(got, wanted, tolerance=1e-5):
    """Largest difference within `tolerance` of the largest value."""
    return (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(
    "config_class, options, layout",
    [
        (Qwen2Config, {"tie_word_embeddings": True}, "old"),
        (Qwen2Config, {}, "sharded"),
        (Qwen3Config, {"head_dim": 12}, "single"),
        (Qwen3Config, {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True}, "sharded"),
        (LlamaConfig, {}, "old"),
        (LlamaConfig, {"head_dim": 16, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}, "single"),
        (LlamaConfig, {"head_dim": 16, "max_position_embeddings": 256, "rope_parameters": LLAMA3 | TRAINED}, "single"),
        (LlamaConfig, {"head_dim": 16, "max_position_embeddings": 256, "rope_parameters": LLAMA3 | TRAINED}, "old"),
        (Qwen2Config, {"head_dim": 16, "max_position_embeddings": 128, "rope_parameters": YARN | TRAINED}, "single"),
        (Qwen2Config, {"head_dim": 16, "max_position_embeddings": 32, "rope_parameters": YARN | TRAINED}, "old"),
    ],
)
def test_parity_with_transformers_there_and_back(config_class, options, layout, tmp_path):
    """Any difference in the architecture: a missing bias, norm or eps, key heads repeated in the wrong order, head
    size taken for D / H, theta read from the wrong spelling, a tied head not tied (or trained apart), a rope scaling
    ignored or applied only beyond the original context. And a saved checkpoint that `AutoModelForCausalLM` reads
    differently or completes with random weights."""
    reference = reference_model(config_class, **options)
    reference.save_pretrained(tmp_path / "in", max_shard_size="10KB" if layout == "sharded" else "1GB")
    assert (layout == "sharded") == (tmp_path / "in" / "model.safetensors.index.json").exists()
    if layout == "old":
        to_old_layout(tmp_path / "in")
    model = load_model(tmp_path / "in")
    ids = torch.randint(0, 97, (2, 90), generator=torch.Generator().manual_seed(1))  # the scaled: past 32 positions
    wanted = reference(ids).logits
    logits = model(ids).float() @ model.head.float().T
    assert close(logits, wanted)

    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    (logits * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == {name for name, _ in reference.named_parameters()}
    for name, p in reference.named_parameters():
        assert close(gradients[name], p.grad, 1e-4), name

    save_model(model, tmp_path / "out")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert close(again(ids).logits, logits)


RAW = {k: v for k, v in SIZES.items() if k != "rope_parameters"} | {"architectures": ["Qwen2ForCausalLM"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e6},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "rope_theta": 5e5},  # Llama 3.1
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5, "factor": 10.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}},  # Qwen2.5
        {"rope_scaling": YARN, "original_max_position_embeddings": 4096, "rope_theta": 1e6},
        {"rope_scaling": YARN | TRAINED, "original_max_position_embeddings": 4096},  # top level and dict disagree
        {"rope_parameters": YARN | {"rope_theta": 1e6, "factor": 40.0}, "max_position_embeddings": 4096},
        {"rope_parameters": YARN | {"beta_fast": 64, "beta_slow": 2, "truncate": False}},
        {"rope_parameters": YARN | TRAINED | {"beta_slow": 6}},  # a ramp from pair 0 to pair 0
        {"rope_parameters": YARN | {"attention_factor": 0.8, "mscale": 1.0, "mscale_all_dim": 0.5}},
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
        {"rope_parameters": YARN | {"mscale": 0.7}},
        {"rope_parameters": YARN | {"factor": 0.5}},
    ],
)
def test_rotary_angles_far_out(changes):
    """Frequencies rounded otherwise than in `transformers`, where the model was trained: at position 30 000 one ulp of
    a frequency is 2e-3 rad, so short sequences agree and long ones drift apart. And an option of a rope scaling that
    isn't seen in one of its spellings, or a default that is another's."""
    raw = RAW | {"architectures": ["LlamaForCausalLM"], "head_dim": 64, "max_position_embeddings": 131_072} | changes
    positions = torch.tensor([[0, 1, 4095, 31_337, 131_071, 524_287]])
    wanted = LlamaRotaryEmbedding(LlamaConfig.from_dict(copy.deepcopy(raw)))(torch.zeros(1), positions)
    for got, angle in zip(rotary_angles(positions, Config.from_dict(raw), torch.float32), wanted, strict=True):
        assert torch.equal(got[:, :, 0], angle)


@pytest.mark.parametrize(
    "changes, context",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}}, 131_072),
        ({"rope_scaling": YARN}, 163_840),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 8192}, 40_960),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}, 40_960),
    ],
)
def test_the_context_that_a_scaling_opens(changes, context):
    """YaRN switched on as Qwen's model cards say, by a `rope_scaling` alone: everything past max_position_embeddings,
    what it was switched on for, would be refused. And a context that shrinks, or grows twice: Llama's file has the
    long one already."""
    assert Config.from_dict(RAW | {"max_position_embeddings": 40_960} | changes).max_positions == context


def test_sampling_with_a_scaled_rope(tmp_path):
    """A decoding step whose frequencies or factor on cos and sin are not those of the prompt and of training."""
    options = {"head_dim": 16, "max_position_embeddings": 32, "rope_parameters": YARN | TRAINED}
    reference = reference_model(Qwen2Config, **options)
    reference.save_pretrained(tmp_path / "model")
    prompt, settings = list(range(20)), {"temperature": 0.0, "max_new_tokens": 108, "stop_ids": []}
    ((sample,),) = Sampler(load_model(tmp_path / "model")).sample([prompt], keys=["0"], **settings)
    logprobs, ids = reference(torch.tensor([prompt + sample.ids])).logits[0, 19:-1].log_softmax(-1).max(-1)
    assert ids.tolist() == sample.ids and len(set(sample.ids)) > 20
    assert (torch.tensor(sample.logprobs) - logprobs).abs().max() < 1e-5


@pytest.mark.parametrize(
    "changes, theta",
    [
        ({}, 1e4),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}, 5e5),  # both spellings: as in transformers
        ({"rope_scaling": {"type": "default"}, "rope_theta": 1e6}, 1e6),
    ],
)
def test_rope_theta_in_both_spellings(changes, theta):
    """A spelling of theta that isn't seen: the model loads with 10 000 and is subtly wrong."""
    assert Config.from_dict(RAW | changes).rope_theta == theta
    fresh = Qwen2Config.from_dict(copy.deepcopy(RAW | changes))
    assert fresh.rope_parameters["rope_theta"] == theta  # and so says transformers


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": None}, "none"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3.* needs low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": None}}, "yarn.* needs factor"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "longrope"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": {"rope_type": "default"}}, "dynamic"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, named):
    """A checkpoint that loads and then computes something else than it was trained for."""
    with pytest.raises(ValueError, match=named):
        Config.from_dict(RAW | changes)


def test_broken_directories(qwen3, tmp_path):
    """Missing, superfluous or misshapen weights that pass: parameters would stay on the meta device or be dropped.
    And a stale index that wins over the newer single file (transformers reads the single file)."""
    _, path = qwen3
    weights = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"

    def load_with(**changes):
        changed = {k: v for k, v in (weights | changes).items() if v is not None}
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        return load_model(path)

    with pytest.raises(ValueError, match=f"missing.*{name}"):
        load_with(**{name: None})
    with pytest.raises(ValueError, match=rf"{name} is \(40, 31\).*\(40, 32\)"):
        load_with(**{name: weights[name][:, 1:].contiguous()})
    with pytest.raises(ValueError, match=r"q_proj\.bias is .*no such weight"):
        load_with(**{"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})
    index = {"weight_map": dict.fromkeys(weights, "gone.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_with()
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)


SIZE_FIELDS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
NUMBERS = [*SIZE_FIELDS, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"]
IMPOSSIBLE = ["32", [32], {"a": 1}, True, -1, 1e400, math.nan, 10**30]


@pytest.mark.parametrize(
    "field, values",
    [
        *((name, [None]) for name in SIZE_FIELDS),
        *((name, IMPOSSIBLE) for name in NUMBERS),
        *((name, [0, 2.5]) for name in NUMBERS if name not in ("rms_norm_eps", "rope_theta")),
        ("num_hidden_layers", [200_000]),
        ("num_key_value_heads", [3, 9]),
        ("head_dim", [15]),
        *((name, ["false", 1, [], {}]) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")),
        ("architectures", ["Qwen2ForCausalLM", {}, {"0": "a"}, [], [None], [["Qwen2ForCausalLM"]], 5]),
        ("quantization_config", ["fp8", [1], {"bits": 4}]),
        ("layer_types", [["full_attention", "linear_attention"], "full_attention", {"a": 1}, [["full_attention"]]]),
        ("hidden_act", [["silu"], {"a": 1}, 5]),
        *((name, ["yarn", ["yarn"], 5, True, {"type": ["yarn"]}]) for name in ("rope_scaling", "rope_parameters")),
        ("rope_parameters", [{"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": "1e6"}]),
        ("rope_scaling", [YARN | {name: "1"} for name in ("factor", "beta_fast", "mscale", "attention_factor")]),
        ("rope_scaling", [YARN | {"original_max_position_embeddings": value} for value in ("32", 0, -1, 2.5)]),
        ("rope_scaling", [LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}, LLAMA3 | {"factor": math.inf}]),
    ],
)
def test_impossible_configs_are_refused_by_field(field, values):
    """KeyError, TypeError or ZeroDivisionError from a config.json that is damaged or another program's; 200,000 layers
    that have no end; a nested rope whose theta is 10,000 without a word; a string that is true. And a message that
    doesn't say which field it is."""
    named = {"architectures": "architecture", "quantization_config": "quantisation", "layer_types": "sliding"}
    named |= dict.fromkeys(
        ("rope_scaling", "rope_parameters"), "rope|factor|beta|mscale|original_max_position_embeddings"
    )
    named |= {"hidden_size": "hidden_size|head_dim", "num_attention_heads": "num_attention_heads|head_dim"}
    for value in values:
        with pytest.raises(ValueError, match=named.get(field, field)) as error:
            Config.from_dict(RAW | {field: value})
        assert len(str(error.value)) < 300 and type(error.value) is ValueError


@pytest.mark.parametrize("name, config_class", [("Qwen2", Qwen2Config), ("Qwen3", Qwen3Config), ("Llama", LlamaConfig)])
def test_fields_that_may_be_missing(name, config_class):
    """A context of 2,048 tokens where `transformers` has 32,768; null that isn't the default."""
    needed = {field: RAW[field] for field in SIZE_FIELDS} | {"architectures": [f"{name}ForCausalLM"]}
    config, theirs = Config.from_dict(needed), config_class()
    assert config.max_positions == theirs.max_position_embeddings and config.norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == 10_000.0 and not config.tied
    optional = {*NUMBERS, "tie_word_embeddings", "attention_bias", "mlp_bias", "layer_types", "rope_scaling"} - {
        *SIZE_FIELDS
    }
    assert Config.from_dict(needed | dict.fromkeys(optional)) == dataclasses.replace(config, raw=ANY)


def no_json(path: Path, name: str) -> None:
    """Each kind of file that isn't a JSON object."""
    for content in (b"", b"{", b"null", b"[]", b"5", b'"a"', b"[" * 100_000, "{}".encode("utf-16"), b"\xff{}", b"\0"):
        (path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: not (a )?JSON"):
            load_model(path)


def test_damaged_files_of_a_model_directory(qwen3, tmp_path):
    """A traceback from a torn file; shards that are read from outside the directory; weights of 8 bits or integers that
    are cast without their scales."""
    _, path = qwen3
    config, weights = (path / "config.json").read_bytes(), (path / "model.safetensors").read_bytes()
    no_json(path, "config.json")
    (path / "config.json").write_bytes(config)
    for content in (
        b"",
        b"{}",
        weights[:-1],
        weights[: len(weights) // 2],
        b"\xff" * 9,
        weights[:8] + b"[" + weights[9:],
    ):
        (path / "model.safetensors").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"model.safetensors: not a whole file .*fetch it again|weights are missing"
        ):
            load_model(path)

    tensors = load(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool):
        save_file(tensors | {name: tensors[name].to(dtype)}, path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{name} is {dtype}, quantised; use an unquantised checkpoint"):
            load_model(path)

    (tmp_path / "outside.safetensors").write_bytes(weights)
    (path / "model.safetensors").unlink()
    index = "model.safetensors.index.json"
    no_json(path, index)
    for other in (
        {},
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": "a"},
        {"metadata": {}},
    ):
        (path / index).write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"{index}: no weight_map; fetch the file again"):
            load_model(path)
    for shard in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "a/b", "", "..", 5, None, ["a"], {}):
        (path / index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
        with pytest.raises(ValueError, match=f"{index}: weight_map must name safetensors files of this dir"):
            load_model(path)
    (path / "part.safetensors").symlink_to(tmp_path / "outside.safetensors")  # as in the hub's cache
    (path / index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    load_model(path)


@pytest.mark.parametrize("error", [PermissionError(1, "Operation not permitted"), OSError(95, "not supported")])
def test_saving_where_there_are_no_permissions(qwen3, tmp_path, monkeypatch, error):
    """A run that fails at its first save on CIFS or a mounted bucket, where modes can't be set; files of somebody that
    are copied along because their names begin with "tokenizer"."""
    _, path = qwen3
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_of_mine.txt").write_text("mine")
    (path / "tokenizer.model").mkdir()

    def chmod(*_, **__):
        raise error

    monkeypatch.setattr(os, "chmod", chmod)
    save_model(load_model(path), tmp_path / "out", tokenizer_from=path)
    written = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} - {"generation_config.json"} == written


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors off the meta device ever held at the same time (storages shared count once)."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.alive += [weakref.ref(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not x.is_meta]
        tensors = [x for reference in self.alive if (x := reference()) is not None]
        self.alive = [weakref.ref(x) for x in tensors]
        self.peak = max(self.peak, sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_holds_one_copy_and_one_dtype(qwen3, dtype, monkeypatch):
    """A random init on the CPU before the real weights, a state dict kept beside the model, a tensor read twice; a
    parameter that stays in the file's dtype; and weights that are a shared mapping of the checkpoint, so that
    training in place rewrites the file."""
    _, path = qwen3
    read, content = [], (path / "model.safetensors").read_bytes()

    class Counted:
        def __init__(self, *args, **kwargs):
            self.file = open_file(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    open_file = transformer.safe_open
    monkeypatch.setattr(transformer, "safe_open", Counted)
    with LiveBytes() as live:
        model = load_model(path, dtype=dtype)
    parameters = dict(model.named_parameters())
    assert sorted(read) == sorted(parameters)
    own = sum(p.numel() * p.element_size() for p in parameters.values())
    in_flight = 2 * max(p.numel() * 4 for p in parameters.values())  # as in the file, the last one and this one
    assert own <= live.peak <= own + in_flight < 2 * own
    assert {p.dtype for p in parameters.values()} == {dtype} and all(p.requires_grad for p in parameters.values())
    assert model(torch.zeros(1, 3, dtype=torch.long)).dtype == dtype
    with torch.no_grad():
        for p in parameters.values():
            p.add_(1.0)
    assert (path / "model.safetensors").read_bytes() == content


def test_saved_directory_is_complete_and_in_its_dtype(qwen3, tmp_path):
    """A checkpoint whose config says another dtype than its weights have (in either spelling: "auto" casts), a tied
    head stored twice, or a tokenizer that loads differently because a file was left behind."""
    _, path = qwen3
    edit_config(path, tie_word_embeddings=True, torch_dtype="float32", dtype="float32")
    kept = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"]
    kept += ["added_tokens.json", "chat_template.jinja", "generation_config.json"]
    for name in [*kept, "trainer_state.json"]:
        (path / name).write_text(name)
    model = load_model(path, dtype=torch.bfloat16)
    save_model(model, tmp_path / "deep" / "out", tokenizer_from=path)
    written = {file.name for file in (tmp_path / "deep" / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", *kept}
    (tmp_path / "deep" / "out" / "generation_config.json").unlink()
    raw = json.loads((tmp_path / "deep" / "out" / "config.json").read_text())
    assert raw["dtype"] == raw.get("torch_dtype", "bfloat16") == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out", dtype="auto")
    weights = load_file(tmp_path / "deep" / "out" / "model.safetensors")
    assert weights.keys() == dict(model.named_parameters()).keys() and "lm_head.weight" not in weights
    for name, p in again.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, weights[name])


@pytest.mark.parametrize(
    "where, name, call",
    [
        (pathlib.Path, "write_text", 1),
        (shutil, "copy", 1),
        (transformer, "save_file", 1),
        (pathlib.Path, "replace", 1),
        (pathlib.Path, "replace", 3),  # config, generation_config, weights
    ],
)
def test_a_crash_while_saving_leaves_a_checkpoint_that_loads(qwen3, where, name, call, tmp_path, monkeypatch):
    """Writing over the old files, or removing them before the new ones are in place: killed in between, the run has
    lost its only checkpoint. And metrics or training state beside the weights that a save sweeps away."""
    _, source = qwen3
    path = tmp_path / "checkpoint"
    model = load_model(source)
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_model(model, path, tokenizer_from=source)
    (path / "trainer").mkdir()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    original, calls = getattr(where, name), []

    def crash(*args, **kwargs):
        calls.append(name)
        if len(calls) < call:
            return original(*args, **kwargs)
        if name != "replace":  # half a file is left behind
            pathlib.Path(args[0] if name == "write_text" else args[1]).write_bytes(b"torn")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, name, crash)
        save_model(model, path, tokenizer_from=source)
    for key, tensor in load_model(path).state_dict().items():
        assert torch.equal(tensor, old[key])
    AutoModelForCausalLM.from_pretrained(path)  # reads generation_config.json, too

    save_model(model, path, tokenizer_from=source)
    assert {x.name for x in path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "trainer"}
    assert torch.equal(load_model(path).head, model.head)


def gradients_of(model, forward):
    """{name: gradient} after a backward pass from forward(), weighted so that no position is like another."""
    model.zero_grad()
    hidden = forward()
    weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
    (hidden.float() * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_equal_separate_rows(qwen3, checkpointing):
    """Tokens that see their neighbours' sequences or change places, a padded row that leaks into a gradient; and
    activation checkpointing that changes gradients, or that recomputes without saving memory."""
    _, path = qwen3
    model = load_model(path)
    lengths = [7, 1, 12, 3]
    ids = torch.randint(0, 97, (sum(lengths),), generator=torch.Generator().manual_seed(3))

    def separate():
        return torch.cat([model(row[None])[0] for row in ids.split(lengths)])

    padded = torch.nn.utils.rnn.pad_sequence(ids.split(lengths), batch_first=True, padding_value=5)
    hidden = separate()
    wanted = gradients_of(model, separate)
    rows = torch.cat([row[:n] for row, n in zip(model(padded), lengths, strict=True)])
    assert close(rows, hidden)  # right padding, as in a plain batch

    def saved_bytes(forward):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.data_ptr(): x.nbytes}) or x, lambda x: x
        ):
            out = forward()
        return out, sum(sizes.values())

    plain, plain_bytes = saved_bytes(lambda: model.packed(ids, torch.tensor(lengths)))
    assert close(plain, hidden)
    model.checkpointing = checkpointing
    again, bytes_now = saved_bytes(lambda: model.packed(ids, torch.tensor(lengths)))
    assert torch.equal(again, plain)
    assert bytes_now < plain_bytes / 2 if checkpointing else bytes_now == plain_bytes
    got = gradients_of(model, lambda: model.packed(ids, torch.tensor(lengths)))
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert close(got[name], gradient), name


def test_packed_gives_the_logprobs_of_its_hidden_states(qwen3):
    """`targets` handed to the model: the temperature forgotten, or rows in another order than the tokens."""
    _, path = qwen3
    model = load_model(path)
    ids, lengths = torch.arange(20, 31), torch.tensor([4, 7])
    targets = torch.cat([ids[1:], torch.tensor([-1])])
    targets[3] = -1
    logprobs, entropy = model.packed(ids, lengths, targets, temperature=0.7)
    log_p = (model.packed(ids, lengths) @ model.head.T / 0.7).log_softmax(-1)
    wanted = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets < 0, 0.0)
    assert close(logprobs, wanted)
    assert close(entropy, (-log_p.exp() * log_p).sum(-1).masked_fill(targets < 0, 0.0))


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def test_flash_attention_is_called_as_torch_defines_it(monkeypatch):
    """On machines without a GPU: a call of `varlen_attn` that this torch doesn't accept, isn't causal, or mixes up
    starts, lengths or head groups; fp32 handed to flash attention, which it refuses; and positions that run on across
    a boundary, which attention can't tell (it sees differences only) until they leave the trained range."""
    calls, signature = [], inspect.signature(varlen.varlen_attn)

    def by_hand(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        calls.append(call)
        assert call["window_size"] == (-1, 0)  # causal
        assert call["cu_seq_q"].dtype == torch.int32 and torch.equal(call["cu_seq_q"], call["cu_seq_k"])
        assert call["max_q"] == call["max_k"] == 5
        pieces = (call[x].tensor_split(call["cu_seq_q"][1:-1].long()) for x in ("query", "key", "value"))
        return torch.cat(
            [transformer.causal_attention(0, *(x[None] for x in qkv))[0] for qkv in zip(*pieces, strict=True)]
        )

    monkeypatch.setattr(varlen, "varlen_attn", by_hand)
    positions, attend = packed_attention(torch.tensor([3, 5, 1]))
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0]]
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 9, heads, 16, generator=generator) for heads in (4, 2, 2))
    wanted = attend(0, q, k, v)
    assert torch.equal(attend(0, *(x.as_subclass(OnCuda) for x in (q, k, v))), wanted) and not calls
    got = attend(0, *(x.bfloat16().as_subclass(OnCuda) for x in (q, k, v)))
    assert len(calls) == 1 and close(got.float(), wanted, 2e-2)
    # The same with the first two tokens of the sequence of five standing there once, as those of the first, too.
    rows = torch.tensor([0, 1, 2, 0, 1, 3, 4, 5, 6])
    positions, attend = packed_attention(torch.tensor([3, 5, 1]), rows)
    assert positions.tolist() == [[0, 1, 2, 2, 3, 4, 0]]
    q, k, v = (x[:, :7] for x in (q, k, v))
    _, plain = packed_attention(torch.tensor([3, 5, 1]))
    wanted = plain(0, *(x[:, rows] for x in (q, k, v)))[:, [0, 1, 2, 5, 6, 7, 8]]
    assert close(attend(0, q, k, v), wanted, 1e-6)
    got = attend(0, *(x.bfloat16().as_subclass(OnCuda) for x in (q, k, v)))
    assert len(calls) == 2 and close(got.float(), wanted, 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_packed_on_cuda(tmp_path, dtype, tolerance):
    """Flash attention over packed rows that differs from plain attention over each (masks, head groups, lengths)."""
    reference_model(Qwen3Config, head_dim=64).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", "cuda", dtype)
    lengths = [70, 1, 129, 3]
    ids = torch.randint(0, 97, (sum(lengths),), device="cuda")

    def separate():
        return torch.cat([model(row[None])[0] for row in ids.split(lengths)])

    def packed():
        return model.packed(ids, torch.tensor(lengths, device="cuda"))

    assert close(packed().float(), separate().float(), tolerance)
    wanted, got = gradients_of(model, separate), gradients_of(model, packed)
    for name, gradient in wanted.items():
        assert close(got[name].float(), gradient.float(), 3 * tolerance), name
