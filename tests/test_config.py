"""Where settings come from, and what is said when they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reprise.config import load_settings, resolve_settings
from reprise.errors import ConfigError
from reprise.ipc.messages import EngineConfig
from reprise.settings import (
    Settings,
    choices,
    environment_name,
    flag_name,
    is_switch,
    kind,
    parse_size,
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "reprise.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(
    flags: dict[str, Any] | None = None, environ: dict[str, str] | None = None, file: Path | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags or {}, environ or {}, file)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_without_sources_every_setting_has_its_default() -> None:
    settings = load_settings({}, {"HOME": "/root", "REPRISE_CONFIG": "x.yaml", "REPRISE_TORCH": "cpu"}, None)
    assert settings == Settings()
    assert (settings.model, settings.host, settings.port) == ("pocket", "127.0.0.1", 8000)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1\nmax_num_seqs: 1\nblock_size: 1\n")
    resolved = resolve_settings({"port": "3"}, {"REPRISE_PORT": "2", "REPRISE_MAX_NUM_SEQS": "2"}, file)
    settings = resolved.settings
    assert (settings.port, settings.max_num_seqs, settings.block_size) == (3, 2, 1)
    assert settings.max_num_batched_tokens == 2048
    assert resolved.sources == {
        "port": "--port",
        "max_num_seqs": "REPRISE_MAX_NUM_SEQS",
        "block_size": f"{file}:3",
    }


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name != "api_key"])
def test_every_setting_can_come_from_every_source(name: str, tmp_path: Path) -> None:
    existing = write(tmp_path, "key-1\n")
    text = {
        "model": "m", "revision": "main", "served_model_name": "one", "chat_template": str(existing),
        "api_key_file": str(existing), "host": "::1", "cors_origins": "https://example.org",
        "allowed_hosts": "example.org", "bundle_dir": "bundles",
        "kv_cache_memory": "3MiB", "max_body_size": "3MiB", "gpu_memory_utilization": "0.5",
        "max_num_seqs": "65", "speculate": "ngram", "draft_model": "m",
    }.get(name)  # fmt: skip
    field = Settings.model_fields[name]
    if text is None:
        opposite = str(not field.default).lower()
        text = opposite if is_switch(field) else (choices(field) or ("2047",))[-1]
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name}: {text if ':' not in text else repr(text)}\n")
    from_sources = [
        load_settings({name: text}, {}, None),
        load_settings({}, {environment_name(name): text}, None),
        load_settings({}, {}, file),
    ]
    assert from_sources[0] == from_sources[1] == from_sources[2]
    assert getattr(from_sources[0], name) != getattr(Settings(), name)


def test_speculation_by_a_draft_model_takes_one() -> None:
    assert problems({"speculate": "draft"}) == ["--speculate: draft takes a draft model: name one with --draft-model"]
    settings = load_settings({"speculate": "draft", "draft_model": "small"}, {}, None)
    assert settings.draft_model_path == "small"
    assert load_settings({"draft_model": "small"}, {}, None).draft_model_path is None


def test_every_setting_says_what_it_is_and_what_is_right() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description
        assert field.description.endswith("."), name
        assert kind(field).expected, name


def test_every_problem_is_listed_with_its_source(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "prot: 1\nmax-model-len: 5\nnum_threads: true\nrevision: 12\nprefix_cache: maybe\nblock_size: 1\n"
        "block_size: 2\n",
    )
    found = problems(
        {"port": "99999", "kv_cache_memory": "2 gigs", "header_timeout": "nan"},
        {"REPRISE_DTYPE": "fp16", "REPRISE_MAX_NUM_SEQ": "4", "REPRISE_GPU_MEMORY_UTILIZATION": "1.5"},
        file,
    )
    assert sorted(found) == sorted(
        [
            f"{file}:1: prot is no setting; did you mean port?",
            f"{file}:2: max-model-len is no setting; did you mean max_model_len?",
            f"{file}:3: num_threads: True is not a whole number of at least 1",
            f"{file}:4: revision: 12 is not text, in quotes where it could be read as a number",
            f"{file}:5: prefix_cache: 'maybe' is not true or false",
            f"{file}:7: block_size was set before, at {file}:6",
            "REPRISE_DTYPE: 'fp16' is not one of auto, float32, bfloat16, float16",
            "REPRISE_MAX_NUM_SEQ is no setting; did you mean REPRISE_MAX_NUM_SEQS?",
            "REPRISE_GPU_MEMORY_UTILIZATION: '1.5' is not a number above 0 and at most 1",
            "--port: '99999' is not a whole number from 1 to 65535",
            "--kv-cache-memory: '2 gigs' is not a size such as 512MiB or 2GiB",
            "--header-timeout: 'nan' is not a number of seconds above 0, without a unit",
        ]
    )


def test_a_files_problems_come_in_the_order_of_its_lines_before_all_others(tmp_path: Path) -> None:
    file = write(tmp_path, "# a comment\nport: x\nprot: 1\n" + "\n" * 6 + "dtype: fp16\ntier: 1\nnum_thread: 1\n")
    found = problems({"host": ""}, {"REPRISE_DEVIC": "cpu"}, file)
    assert [problem.removeprefix(f"{file}:").split(":")[0] for problem in found[:5]] == ["2", "3", "10", "11", "12"]
    assert {problem.split()[0].strip(":") for problem in found[5:]} == {"REPRISE_DEVIC", "--host"}


def test_a_template_is_read_once_and_handed_on(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}é", encoding="utf-8")
    resolved = resolve_settings({"chat_template": str(file)}, {}, None)
    assert resolved.chat_template == "{{ messages }}é"
    assert resolved.settings.chat_template == file
    assert resolve_settings({}, {}, None).chat_template is None


def test_pocket_is_refused_where_it_could_be_a_model_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()
    assert load_settings({"model": "pocket"}, {}, None) == Settings()  # a directory without a model
    (tmp_path / "pocket/config.json").write_text("{}")
    (problem,) = problems({"model": "pocket"})
    assert problem.startswith("MODEL: 'pocket' is the bundled model, but")
    assert "write ./pocket for the directory" in problem
    assert problems(environ={"REPRISE_MODEL": "pocket"})[0].startswith("REPRISE_MODEL: ")
    assert load_settings({"model": "./pocket"}, {}, None).model_path == "./pocket"
    assert load_settings({}, {}, None).model_path.endswith("/reprise/pocket")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- port: 1\n", ":1: must be lines of `name: value`"),
        ("port: 1\n  host: x\n", ":2: not YAML: mapping values are not allowed here"),
        ("port: !!python/object:os.system x\n", ":1: not YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    assert [found.startswith(f"{file}{message}") for found in problems(file=file)] == [True]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert problems(file=missing) == [f"--config: {missing} cannot be read: No such file or directory"]
    assert problems({"chat_template": str(missing)}) == [
        f"--chat-template: '{missing}' cannot be read: No such file or directory"
    ]


def test_an_empty_file_and_null_values_are_defaults(tmp_path: Path) -> None:
    assert load_settings({}, {}, write(tmp_path, "# nothing\n")) == Settings()
    assert load_settings({}, {}, write(tmp_path, "port:\nrevision: null\n")) == Settings()


def test_an_empty_variable_is_unset() -> None:
    assert load_settings({}, {"REPRISE_API_KEY": "", "REPRISE_PORT": ""}, None) == Settings()


def test_lists_from_every_source(tmp_path: Path) -> None:
    assert load_settings({}, {"REPRISE_CORS_ORIGINS": "https://a.org, https://b.org"}, None).cors_origins == [
        "https://a.org",
        "https://b.org",
    ]
    assert load_settings({"served_model_name": ("a", "b,c")}, {}, None).served_model_name == ["a", "b,c"]
    assert load_settings({}, {}, write(tmp_path, "served_model_name: [a, b]\n")).model_names == ["a", "b"]


def test_keys_are_joined_with_those_of_the_file_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-file-1\n\nsk-file-2\n")
    settings = load_settings({"api_key_file": str(file)}, {"REPRISE_API_KEY": "sk-env"}, None)
    assert [key.get_secret_value() for key in settings.api_key] == ["sk-env", "sk-file-1", "sk-file-2"]
    sources = resolve_settings({"api_key_file": str(file)}, {}, None).sources
    assert sources == {"api_key_file": "--api-key-file", "api_key": "--api-key-file"}
    assert "sk-" not in repr(settings)
    assert "sk-" not in settings.model_dump_json()


@pytest.mark.parametrize("blank", [" ", "\n", ",", " , "])
def test_a_variable_for_keys_without_one_is_no_server_without_keys(blank: str, tmp_path: Path) -> None:
    """As of a secret that is empty, or wrongly joined; it would hide the file's."""
    file = write(tmp_path, "api_key: [sk-file]\n")
    found = problems(environ={"REPRISE_API_KEY": blank}, file=file)
    assert found == ["REPRISE_API_KEY has no item: leave it empty or unset, or give one"]
    settings = load_settings({}, {"REPRISE_API_KEY": ""}, file)
    assert [key.get_secret_value() for key in settings.api_key] == ["sk-file"]


def test_a_wrong_key_is_refused_without_showing_it(tmp_path: Path) -> None:
    file = write(tmp_path, "api_key: [{secret: sk-1}]\n")
    assert problems(file=file) == [f"{file}:1: api_key: the value is not a key, or a list of keys"]
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert problems({"api_key_file": str(empty)}) == [f"--api-key-file: '{empty}' has no key: one a line"]


def test_settings_that_contradict_each_other_are_refused() -> None:
    (problem,) = problems({"max_num_seqs": "4096"})
    assert problem == (
        "max_num_batched_tokens (by default): 2048 is less than max_num_seqs, 4096: every running sequence"
        " needs one token a step, so raise this one or lower the other"
    )


def test_variables_that_kubernetes_sets_get_their_remedy() -> None:
    found = problems(environ={"REPRISE_SERVICE_HOST": "10.0.0.1", "REPRISE_PORT_8000_TCP": "tcp://10.0.0.1:8000"})
    assert all("enableServiceLinks: false" in problem for problem in found)
    assert len(found) == 2


def test_engine_config_takes_over_every_field_that_the_engine_knows() -> None:
    config = Settings(model="m", block_size=8, kv_cache_memory="1GiB", num_threads=3).engine_config()
    assert config == EngineConfig(model="m", block_size=8, kv_cache_memory=2**30, num_threads=3)


def test_engine_defaults_are_the_settings_defaults() -> None:
    assert Settings(model="m").engine_config() == EngineConfig(model="m")


def test_pocket_is_the_directory_in_the_package() -> None:
    assert Settings().model_path.endswith("/reprise/pocket")
    assert Settings(model="./pocket").model_path == "./pocket"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("10B", 10),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1.5 MiB", 1572864),
        ("3gib", 3 * 2**30),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@given(st.integers(min_value=1, max_value=2**40))
def test_a_size_in_bytes_is_itself(size: int) -> None:
    assert parse_size(str(size)) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1 XiB", "2G", "0x10", "1e3", "1.5.2MiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-body-size: "):
        load_settings({"max_body_size": text}, {}, None)


def test_names_of_a_setting() -> None:
    assert (flag_name("max_model_len"), environment_name("max_model_len")) == (
        "--max-model-len",
        "REPRISE_MAX_MODEL_LEN",
    )
    assert flag_name("model") == "MODEL"


def test_shown_settings_are_valid_yaml_for_the_same_settings(tmp_path: Path) -> None:
    settings = Settings(model="m", served_model_name=["a: b"], kv_cache_memory="1GiB")
    file = write(tmp_path, yaml.safe_dump(settings.model_dump(mode="json")))
    assert load_settings({}, {}, file) == settings
