"""Renders a chat template once in a process of its own that can be killed.

The sandbox keeps a template from the file system and the interpreter, not from computing for ever or from
filling the memory. `python -m reprise.text.template_trial` reads `{"template", "messages", "variables"}` on
standard input. It imports Jinja and nothing else: the whole trial takes about 0.1 s.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from reprise.errors import ModelLoadError

CPU_SECONDS = 2
WALL_SECONDS = 30
MEMORY_BYTES = 1 << 30
MAX_TEMPLATE_CHARACTERS = 1 << 20

_EXIT_SYNTAX, _EXIT_MEMORY = 3, 4
_REMEDY = "Give another template with --chat-template FILE."


def try_template(template: str, variables: dict[str, Any]) -> None:
    """Raise ModelLoadError for a template that does not compile, or exceeds its limits on a greeting.

    A template that refuses the greeting, for whatever reason, is no error here: it may want other messages.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ModelLoadError(
            f"The chat template has {len(template):,} characters, more than {MAX_TEMPLATE_CHARACTERS:,}. {_REMEDY}"
        )
    messages = [{"role": "user", "content": "Hello!"}]
    job = json.dumps({"template": template, "messages": messages, "variables": variables}, default=str)
    source_root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [source_root, os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "reprise.text.template_trial"],
            input=job.encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _too_slow(f"{WALL_SECONDS} s") from None
    except OSError:
        return  # no process to be had: the server starts without the trial
    if done.returncode == _EXIT_SYNTAX:
        raise ModelLoadError(f"The chat template does not compile: {done.stderr.decode()} {_REMEDY}")
    if done.returncode == _EXIT_MEMORY:
        raise ModelLoadError(
            f"The chat template needs more than {MEMORY_BYTES >> 30} GiB of memory for a greeting. {_REMEDY}"
        )
    if done.returncode < 0:
        raise _too_slow(f"{CPU_SECONDS} s of CPU time")


def _too_slow(limit: str) -> ModelLoadError:
    return ModelLoadError(f"The chat template does not finish within {limit} on a greeting. {_REMEDY}")


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}` of chat templates, which marks a model's own words and renders as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads the attribute from the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """The environment of chat templates as transformers sets it up, as far as the cost of rendering goes."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    job = json.load(sys.stdin)
    _limit()
    try:
        template = _environment().from_string(job["template"])
        template.render(messages=job["messages"], add_generation_prompt=True, **job["variables"])
    except jinja2.TemplateSyntaxError as error:
        sys.stderr.write(f"line {error.lineno}: {error.message}.")
        return _EXIT_SYNTAX
    except MemoryError:
        return _EXIT_MEMORY
    except Exception:  # noqa: BLE001 - a template may raise anything; whether it suits a greeting is not asked
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
