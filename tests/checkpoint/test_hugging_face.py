"""Weights of Hugging Face folders, written by the transformers library: read in any part, and refused if not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.reference.hugging_face import to_hugging_face_weights
from tests.support.foreign import SCALING, SMALL, save_hugging_face, shape
from titan.checkpoint.hugging_face import INDEX, HuggingFaceWeights, is_hugging_face, to_halves, to_neighbours
from titan.checkpoint.hugging_face_config import read_hugging_face_config, to_hugging_face_config
from titan.config.schema import ModelConfig
from titan.errors import CheckpointError
from titan.models.llama import LLAMA, Llama

SHAPES = {
    "plain": SMALL,
    "tied": shape(tie_embeddings=True),
    "scaled": shape(rope_scaling=SCALING),
    "one kv head": shape(n_kv_heads=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files. To be read only."""
    path = tmp_path_factory.mktemp("hugging_face") / "small"
    save_hugging_face(path, SMALL, shard_bytes=40_000)
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    to = tmp_path / "small"
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def open_folder(folder: Path) -> HuggingFaceWeights:
    """Return a folder's weights, in the shape that its config says."""
    return HuggingFaceWeights(folder, read_hugging_face_config(folder), LLAMA)


def load_llama(weights: HuggingFaceWeights, config: ModelConfig) -> Llama:
    """Return titan's model with weights from a folder."""
    model = Llama(config, 16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
    model.init_buffers("cpu")
    return model


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shard_bytes", ["5GB", 40_000])
def test_the_logits_are_those_of_transformers(tmp_path: Path, name: str, shard_bytes: int | str) -> None:
    """A folder, of one file or several, gives titan a model that computes what transformers computes from it."""
    theirs = save_hugging_face(tmp_path, SHAPES[name], shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes != "5GB")
    config = read_hugging_face_config(tmp_path, "small")
    assert config == SHAPES[name]
    ours = load_llama(open_folder(tmp_path), config)
    tokens = torch.arange(16).unsqueeze(0) * 5 % 70
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_any_rows_and_columns_are_those_of_the_whole(folder: Path) -> None:
    """Also where rows are reordered, a range may begin and end anywhere in a head, and be empty."""
    weights = open_folder(folder)
    for name in ("layers.1.attention.wq.weight", "layers.1.attention.wk.weight", "layers.0.feed_forward.w2.weight"):
        whole = weights.read(name)
        for start in range(0, whole.shape[0] + 1, 3):
            for stop in range(start, whole.shape[0] + 1, 5):
                part = weights.read(name, range(start, stop), range(7, 31))
                assert torch.equal(part, whole[start:stop, 7:31])
                assert part.is_contiguous()
    norm = weights.read("norm.weight", range(5, 9), range(1))
    assert torch.equal(norm, weights.read("norm.weight")[5:9])


def test_a_part_has_only_its_own_memory(folder: Path) -> None:
    """What is read holds on to nothing of the file."""
    part = open_folder(folder).read("layers.1.attention.wq.weight", range(3, 5), range(0, 4))
    assert part.untyped_storage().nbytes() == 2 * 4 * 4


def test_the_order_of_rows_is_that_of_the_reference() -> None:
    """Both directions, against the tests' own reordering."""
    rows = torch.randn(48, 5)
    reordered = to_hugging_face_weights({"layers.0.attention.wq.weight": rows}, SMALL)
    (theirs,) = reordered.values()
    assert torch.equal(to_halves(rows, 8), theirs)
    assert torch.equal(to_neighbours(theirs, 8), rows)


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_that_titan_writes_is_read_by_transformers(tmp_path: Path, name: str) -> None:
    """And means the same to both: the shape comes back, through transformers' own class."""
    config = SHAPES[name]
    content = to_hugging_face_config(config, torch.bfloat16, {"eos_token_id": [3, 4]})
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = LlamaForCausalLM.config_class.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert (theirs.bos_token_id, theirs.eos_token_id) == (None, [3, 4])
    assert read_hugging_face_config(tmp_path, "small") == config
    theirs.save_pretrained(tmp_path / "again")
    assert read_hugging_face_config(tmp_path / "again", "small") == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, r"model_type mistral, architectures \['LlamaForCausalLM'\], and titan computes"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "titan computes model_type llama, LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias = true: titan's Llama has no biases"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu: titan's Llama computes silu"),
        ({"head_dim": 16}, "head_dim = 16 with hidden_size = 48 and 6 heads"),
        ({"head_dim": "wide"}, "head_dim = wide is no positive number"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4 does not divide num_attention_heads = 6"),
        ({"hidden_size": None}, "hidden_size = None is no positive number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = small is no positive number"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = yarn: titan computes default and"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = linear"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "high_freq_factor = None of the rotary"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\] is no object"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "titan turns whole heads"),
    ],
)
def test_what_titan_does_not_compute_is_refused(copy: Path, change: dict[str, Any], words: str) -> None:
    """Each with its key and value: the weights would load, and the model be wrong."""
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match=words):
        read_hugging_face_config(copy)


def _remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00007.safetensors").unlink()


def _cut_shard(folder: Path) -> None:
    path = folder / "model-00003-of-00007.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors, in one file without an index."""

    def edit(folder: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
            path.unlink()
        (folder / INDEX).unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (_remove_shard, "index.json names model-00002-of-00007.safetensors, which is not there"),
    "a truncated shard": (_cut_shard, "model-00003-of-00007.safetensors is no whole safetensors file"),
    "an index of a missing tensor": (
        _edit_index(lambda index: index.update({"model.extra": "model-00001-of-00007.safetensors"})),
        "says that model.extra is in model-00001-of-00007.safetensors, which is not so",
    ),
    "an index without a shard": (
        _edit_index(lambda index: [index.pop(name) for name in list(index) if "layers.1." in name]),
        "model.layers.1.mlp.gate_proj.weight is missing",
    ),
    "an index that leads outside": (
        _edit_index(lambda index: index.update({"model.norm.weight": "../other.safetensors"})),
        "names ../other.safetensors, which is not a file of this folder",
    ),
    "an index of something else": (lambda folder: (folder / INDEX).write_text("[]"), "it holds no JSON object"),
    "an index without a map": (lambda folder: (folder / INDEX).write_text("{}"), "it has no weight_map"),
    "no files": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        r"it has no \*.safetensors file",
    ),
    "a missing tensor": (
        _edit_tensors(lambda tensors: tensors.pop("model.norm.weight")),
        "model.norm.weight is missing",
    ),
    "a tensor too many": (
        _edit_tensors(lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(80)})),
        "model.layers.0.mlp.up_proj.bias is no part of the model",
    ),
    "a tensor of another shape": (
        _edit_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(71, 48)})),
        r"lm_head.weight has the shape \[71, 48\], and the model has \[70, 48\]",
    ),
    "a quantised tensor": (
        _edit_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(70, 48, dtype=torch.int8)})),
        "lm_head.weight is int8: quantised weights are not read",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "a config of nothing": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_whole_is_refused(copy: Path, name: str) -> None:
    """The error names the folder and what is wrong, and no weight is made up for one that is not there."""
    damage, words = DAMAGE[name]
    damage(copy)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_folder(copy)
    assert str(copy) in str(caught.value)


def test_many_problems_are_not_all_listed(copy: Path) -> None:
    """A model of a hundred blocks that is missing is no hundred lines."""
    _edit_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if "norm" not in name])(copy)
    with pytest.raises(CheckpointError, match=r"\n  \.\.\. and 3 more$"):
        open_folder(copy)


def test_pickled_weights_are_named_but_not_opened(tmp_path: Path) -> None:
    """The error says how transformers makes safetensors of them."""
    save_hugging_face(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"It has pytorch_model.bin, .* safe_serialization=True"):
        open_folder(tmp_path)


def test_what_follows_from_the_config_may_be_there(tmp_path: Path) -> None:
    """Rotary frequencies, and the second copy of a tied matrix, which transformers does not load either."""
    save_hugging_face(tmp_path, SHAPES["tied"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = torch.ones(70, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "output.weight" not in open_folder(tmp_path).infos()


def test_a_folder_is_recognised(folder: Path, tmp_path: Path) -> None:
    """By its config.json."""
    assert is_hugging_face(folder)
    assert not is_hugging_face(tmp_path)
    assert not is_hugging_face(tmp_path / "missing")
