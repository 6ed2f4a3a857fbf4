from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models

SCRIPT = """
import sys
from reprise.text.torch_free import keep_torch_out
keep_torch_out()
from reprise.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[1])
print(tokenizer.encode("a", add_special_tokens=False), tokenizer.has_chat_template)
print(tokenizer.render_chat([{"role": "user", "content": "a"}], add_generation_prompt=True))
print([name for name, module in sys.modules.items() if name.startswith("torch") and module is not None])
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_tokenizer_works_and_torch_stays_out(tmp_path: Path) -> None:
    Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    done = run(SCRIPT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[0] True", "a!", "[]"]
    assert "PyTorch" not in done.stderr


def test_torch_that_is_there_stays() -> None:
    done = run(
        "import sys, types\n"
        "sys.modules['torch'] = torch = types.ModuleType('torch')\n"
        "from reprise.text.torch_free import keep_torch_out\n"
        "keep_torch_out()\n"
        "assert sys.modules['torch'] is torch\n"
    )
    assert done.returncode == 0, done.stderr
