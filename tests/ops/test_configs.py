"""The configurations that come along: complete, loadable, and documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reprise.config import load_settings, resolve_settings
from reprise.settings import Settings

CONFIGS = Path(__file__).parents[2] / "configs"
COMMENTED = re.compile(r"^# ([a-z_]+): \S", re.MULTILINE)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
class TestConfiguration:
    def test_loads(self, name: str) -> None:
        settings = load_settings({}, {}, CONFIGS / f"{name}.yaml")
        assert settings.device == {"cpu": "cpu", "gpu": "cuda"}[name]

    def test_names_every_setting(self, name: str) -> None:
        text = (CONFIGS / f"{name}.yaml").read_text()
        active = set(resolve_settings({}, {}, CONFIGS / f"{name}.yaml").sources)
        commented = {key for key in COMMENTED.findall(text) if key in Settings.model_fields}
        assert active | commented == set(Settings.model_fields)

    def test_every_setting_has_a_comment_above_it_or_above_its_neighbour(self, name: str) -> None:
        for block in (CONFIGS / f"{name}.yaml").read_text().split("\n\n")[2:]:
            first_line = block.lstrip("\n").splitlines()[0]
            assert first_line.startswith("# "), first_line

    def test_lines_in_comments_are_right_too(self, name: str, tmp_path: Path) -> None:
        lines = []
        for line in (CONFIGS / f"{name}.yaml").read_text().splitlines():
            match = COMMENTED.match(line)
            setting = match[1] if match else None
            known = setting in Settings.model_fields and " " not in line.partition(": ")[2].replace(", ", ",")
            lines.append(line[2:] if known else line)
        for file in ("template.jinja", "keys.txt"):
            (tmp_path / file).write_text("x")
        text = "\n".join(lines).replace("template.jinja", str(tmp_path / "template.jinja"))
        (tmp_path / "all.yaml").write_text(text.replace("keys.txt", str(tmp_path / "keys.txt")))
        resolved = resolve_settings({}, {}, tmp_path / "all.yaml")
        assert set(resolved.sources) == set(Settings.model_fields)

    def test_defaults_that_are_shown_are_the_defaults(self, name: str) -> None:
        examples = {"revision", "served_model_name", "max_model_len", "chat_template", "kv_cache_memory",
                    "num_threads", "draft_model", "api_key", "api_key_file", "cors_origins", "allowed_hosts",
                    "request_timeout", "deterministic", "bundle_dir"}  # fmt: skip
        text = (CONFIGS / f"{name}.yaml").read_text()
        for key, value in re.findall(r"^# ([a-z_]+): (\S+)$", text, re.MULTILINE):
            if key in Settings.model_fields and key not in examples:
                default = Settings.model_fields[key].default
                assert getattr(load_settings({key: value}, {}, None), key) == default, key
