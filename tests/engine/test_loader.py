"""Loading: what is refused and how it is said, what is chosen, and how the pool is sized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, modeling_utils
from transformers.utils.import_utils import is_env_variable_true

from reprise.engine import loader
from reprise.errors import ModelLoadError
from reprise.ipc.messages import EngineConfig, Ready
from support import tiny_models
from support.engine_driver import load_from

ModelDirectory = Callable[[str], Path]


@pytest.fixture
def copy(model_directory: ModelDirectory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory("llama"), tmp_path / "model"))


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"missing keys: {NORM}"),
        (lambda t: t.update({"model.extra.weight": torch.ones(3)}), "unexpected keys: model.extra.weight"),
        (lambda t: t.update({NORM: torch.ones(7)}), NORM),
        (lambda t: t[NORM].fill_(float("nan")), f"NaN or infinite values: {NORM}"),
        (lambda t: t[NORM][3].fill_(float("inf")), f"NaN or infinite values: {NORM}"),
    ],
    ids=["missing", "unexpected", "misshapen", "nan", "infinite"],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    copy: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit(copy, change)
    with pytest.raises(ModelLoadError, match=message):
        load_from(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_from(copy)


def test_nobody_is_asked_to_convert_pickles(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service of the hub would be told the name, and what it offers would be loaded."""
    variable = "DISABLE_SAFETENSORS_CONVERSION"
    monkeypatch.setenv(variable, "0")
    load_from(copy)
    assert is_env_variable_true(variable)
    assert f'is_env_variable_true("{variable}")' in Path(modeling_utils.__file__).read_text()


def test_pickled_weights_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_from(copy)


def test_a_missing_model_and_an_unknown_architecture_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere"):
        load_from(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))
    with pytest.raises(ModelLoadError, match="no_such_thing"):
        load_from(tmp_path)


def test_remote_code_is_never_run(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    settings["model_type"] = "evil"
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "evil.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ModelLoadError):
        load_from(copy)


def test_the_fingerprint_changes_with_a_single_bit(copy: Path) -> None:
    before = load_from(copy).ready.weights_fingerprint
    assert before == load_from(copy).ready.weights_fingerprint
    edit(copy, lambda t: t[NORM].view(torch.int32)[0].bitwise_xor_(1))
    assert before != load_from(copy).ready.weights_fingerprint


def test_the_configurations_fingerprint_changes_where_no_weight_and_no_logit_of_the_check_does(
    model_directory: ModelDirectory, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(model_directory("mistral-window"), tmp_path / "model"))
    path = directory / "config.json"
    settings = json.loads(path.read_text())

    def loaded(**changes: object) -> Ready:
        path.write_text(json.dumps(settings | changes))
        return load_from(directory, max_model_len=256).ready

    before, after = loaded(sliding_window=200), loaded(sliding_window=210)
    assert before.weights_fingerprint == after.weights_fingerprint
    assert before.numerics_fingerprint == after.numerics_fingerprint
    assert before.model_config_fingerprint != after.model_config_fingerprint


def test_the_configurations_fingerprint_stays_where_nothing_is_computed_from(copy: Path, tmp_path: Path) -> None:
    before = load_from(copy).ready.model_config_fingerprint
    moved = Path(shutil.copytree(copy, tmp_path / "moved"))
    path = moved / "config.json"
    settings = json.loads(path.read_text()) | {"transformers_version": "5.0.0", "_name_or_path": "x"}
    path.write_text(json.dumps(settings, sort_keys=True))
    assert load_from(moved).ready.model_config_fingerprint == before


def test_the_pool_is_what_memory_holds_and_no_more_than_can_be_used(model_directory: ModelDirectory) -> None:
    directory = model_directory("llama")
    per_token = 2 * 2 * (8 + 8) * 4  # layers · kv heads · (key + value) · float32
    small = load_from(directory, kv_cache_memory=100 * per_token).ready
    assert small.num_kv_tokens == 100
    assert small.max_sequence_tokens == 100
    large = load_from(directory, kv_cache_memory=1 << 30, max_num_seqs=2).ready
    assert large.num_kv_tokens == 2 * 256
    assert large.max_sequence_tokens == 256
    with pytest.raises(ModelLoadError, match="kv-cache-memory"):
        load_from(directory, kv_cache_memory=2 * per_token)


def test_max_model_len_is_the_models_own_unless_it_is_less(model_directory: ModelDirectory) -> None:
    directory = model_directory("llama")
    assert load_from(directory).ready.max_model_len == 256
    assert load_from(directory, max_model_len=64).ready.max_model_len == 64
    with pytest.raises(ModelLoadError, match="256 positions"):
        load_from(directory, max_model_len=257)
    assert load_from(model_directory("mamba")).ready.max_model_len == loader.DEFAULT_MAX_MODEL_LEN


def test_a_tier_that_is_asked_for_is_given_or_refused(model_directory: ModelDirectory) -> None:
    assert load_from(model_directory("llama"), tier="padded").ready.tier == "padded"
    with pytest.raises(ModelLoadError, match="--tier paged"):
        load_from(model_directory("falcon"), tier="paged")


@pytest.mark.parametrize(
    ("asked", "saved", "chosen"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float32),
        ("auto", None, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("float16", torch.float32, torch.float16),
    ],
)
def test_dtype_on_a_cpu(asked: str, saved: torch.dtype | None, chosen: torch.dtype) -> None:
    assert loader.choose_dtype(asked, LlamaConfig(dtype=saved), torch.device("cpu")) is chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that is asked for")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelLoadError, match="--device cpu"):
        loader.choose_device("cuda")


def test_progress_goes_from_start_to_end(model_directory: ModelDirectory) -> None:
    heard: list[tuple[str, float]] = []
    loader.load(
        EngineConfig(model=str(model_directory("llama")), kv_cache_memory=1 << 20),
        lambda stage, fraction: heard.append((stage, fraction)),
    )
    fractions = [fraction for _, fraction in heard]
    assert fractions == sorted(fractions)
    assert len([stage for stage, _ in heard if stage == "checking weights"]) > 5
    assert len({stage for stage, _ in heard}) == 5


def test_frozen_rope_no_longer_follows_the_batch() -> None:
    model = tiny_models.build("phi3-longrope")
    loader.freeze_rope(model, 256)
    rotary = model.model.rotary_emb
    short = rotary(torch.zeros(1), torch.tensor([[3]]))[0]
    rotary(torch.zeros(1), torch.tensor([[200]]))
    assert torch.equal(rotary(torch.zeros(1), torch.tensor([[3]]))[0], short)


def test_a_model_that_does_not_generate_from_left_to_right_is_refused(tmp_path: Path) -> None:
    """A BERT that is no decoder looks ahead: whatever would be served is not what `generate` gives."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=199,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        is_decoder=False,
    )
    model = BertLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.25)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="cannot be served"):
        load_from(tmp_path)
