"""Where the settings come from: flags, environment variables, a YAML file.

A setting's value is the first of: its flag, its environment variable, its key in the file, its default.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import yaml
from pydantic import ValidationError

from reprise.errors import ConfigError
from reprise.settings import BUNDLED_MODEL, Settings, environment_name, flag_name, is_switch, kind

__all__ = ["ResolvedSettings", "Settings", "load_settings", "resolve_settings"]

_NO_SETTINGS = ("REPRISE_CONFIG", "REPRISE_TORCH")
"""Variables of ours that are no settings: the configuration file, and `make`'s choice of torch."""


class Sourced(NamedTuple):
    """A value and where it was written: a flag, an environment variable, or file:line."""

    value: Any
    source: str


class ResolvedSettings(NamedTuple):
    """Settings and, for those that are not defaults, where each came from; and the text of `chat_template`'s file."""

    settings: Settings
    sources: dict[str, str]
    chat_template: str | None = None


def load_settings(flags: Mapping[str, Any], environ: Mapping[str, str], config_file: Path | None) -> Settings:
    """The settings of these sources. Raises ConfigError with every problem of theirs, each with its source.

    `flags` has only what was given, under the names of the settings.
    """
    return resolve_settings(flags, environ, config_file).settings


def resolve_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str], config_file: Path | None
) -> ResolvedSettings:
    """As `load_settings`, with the sources kept."""
    problems: list[str] = []
    given: dict[str, Sourced] = {}
    if config_file is not None:
        given |= _known(_read_file(config_file, problems), {name: name for name in Settings.model_fields}, problems)
    environment = {name: Sourced(value, name) for name, value in environ.items() if _is_ours(name, value)}
    given |= _known(environment, {environment_name(name): name for name in Settings.model_fields}, problems)
    flag_values = {flag_name(name): Sourced(value, flag_name(name)) for name, value in flags.items()}
    given |= _known(flag_values, {flag_name(name): name for name in Settings.model_fields}, problems)
    values = {name: _normalised(name, sourced) for name, sourced in given.items()}
    problems += [
        f"{sourced.source} has no item: leave it empty or unset, or give one"
        for name, sourced in given.items()
        if sourced.source == environment_name(name) and values[name] == []
    ]
    chat_template = _read_file_setting("chat_template", values, given, problems)
    _add_keys(values, given, problems)
    _check_bundled_name(given, problems)
    settings = _validated(values, given, problems)
    if problems or settings is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"{count} in the settings:", *_by_line(problems, config_file)]))
    sources = {name: sourced.source for name, sourced in given.items()}
    if "api_key_file" in sources:
        sources.setdefault("api_key", sources["api_key_file"])
    return ResolvedSettings(settings, sources, chat_template)


def _by_line(problems: list[str], config_file: Path | None) -> list[str]:
    """The file's problems first, in the order of its lines; the others as they are."""

    def line(problem: str) -> float:
        number = problem.removeprefix(f"{config_file}:").partition(":")[0]
        return int(number) if problem.startswith(f"{config_file}:") and number.isdigit() else math.inf

    return sorted(problems, key=line)


def _is_ours(name: str, value: str) -> bool:
    """An empty variable counts as unset: that is how compose files pass on what is not there."""
    return name.startswith("REPRISE_") and name not in _NO_SETTINGS and value != ""


def _known(given: Mapping[str, Sourced], settings: Mapping[str, str], problems: list[str]) -> dict[str, Sourced]:
    """What is given for settings, by name; `settings` maps this kind of source's spelling to the name."""
    known = {}
    for spelling, sourced in given.items():
        if spelling in settings:
            known[settings[spelling]] = sourced
            continue
        nearest = difflib.get_close_matches(spelling.replace("-", "_"), settings, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        if spelling.startswith("REPRISE_SERVICE_") or str(sourced.value).startswith("tcp://"):
            hint = "; Kubernetes sets it for a service named reprise: use enableServiceLinks: false"
        where = "" if sourced.source == spelling else f"{sourced.source}: "
        problems.append(f"{where}{spelling} is no setting{hint}")
    return known


def _read_file(path: Path, problems: list[str]) -> dict[str, Sourced]:
    """The keys of a YAML file, each with its line."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            problems.append(f"{path}:{root.start_mark.line + 1}: must be lines of `name: value`")
            return {}
        found: dict[str, Sourced] = {}
        for key_node, value_node in root.value:
            key, source = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
            if key in found:
                problems.append(f"{source}: {key} was set before, at {found[key].source}")
            found[key] = Sourced(loader.construct_object(value_node, deep=True), source)
    except OSError as error:
        problems.append(f"--config: {path} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        problems.append(f"--config: {path} is not UTF-8")
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problems.append(f"{path}{line}: not YAML: {error.problem}")
    except yaml.YAMLError as error:
        problems.append(f"{path}: not YAML: {error}")
    else:
        return {key: sourced for key, sourced in found.items() if sourced.value is not None}
    return {}


def _is_list(name: str) -> bool:
    return get_origin(Settings.model_fields[name].annotation) is list


def _normalised(name: str, given: Sourced) -> Any:
    """A list for settings that are lists: commas part a variable's items, a lone item is a list of one."""
    if not _is_list(name):
        return given.value
    if isinstance(given.value, str) and given.source == environment_name(name):
        return [item.strip() for item in given.value.split(",") if item.strip()]
    return list(given.value) if isinstance(given.value, list | tuple) else [given.value]


def _read_file_setting(
    name: str, values: Mapping[str, Any], given: Mapping[str, Sourced], problems: list[str]
) -> str | None:
    """The text of the file that a setting names; None where it names none, or one that cannot be read."""
    if not isinstance(values.get(name), str | Path):
        return None
    try:
        return Path(values[name]).read_text(encoding="utf-8")
    except OSError as error:
        problems.append(f"{given[name].source}: {str(values[name])!r} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        problems.append(f"{given[name].source}: {str(values[name])!r} is not UTF-8")
    return None


def _add_keys(values: dict[str, Any], given: Mapping[str, Sourced], problems: list[str]) -> None:
    """Join the keys of `api_key_file` to `api_key`."""
    text = _read_file_setting("api_key_file", values, given, problems)
    if text is None:
        return
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        problems.append(f"{given['api_key_file'].source}: {str(values['api_key_file'])!r} has no key: one a line")
    values["api_key"] = [*values.get("api_key", []), *keys]


def _check_bundled_name(given: Mapping[str, Sourced], problems: list[str]) -> None:
    """Refuse the bundled model's name, where written, if it could as well be that of a model directory here."""
    if "model" in given and given["model"].value == BUNDLED_MODEL and Path(BUNDLED_MODEL, "config.json").exists():
        problems.append(
            f"{given['model'].source}: {BUNDLED_MODEL!r} is the bundled model, but a directory of that name is here"
            f" too: write ./{BUNDLED_MODEL} for the directory, or leave MODEL out for the bundled model"
        )


def _validated(values: Mapping[str, Any], given: Mapping[str, Sourced], problems: list[str]) -> Settings | None:
    """The settings; None with problems added where a value is wrong."""
    mistyped = [
        name for name, value in values.items() if isinstance(value, bool) and not is_switch(Settings.model_fields[name])
    ]
    problems.extend(_wrong(name, values[name], given) for name in mistyped)
    try:
        return Settings.model_validate({name: values[name] for name in values if name not in mistyped})
    except ValidationError as error:
        for details in error.errors(include_url=False):
            if details["type"] == "conflict":
                field = details["ctx"]["field"]
                source = given[field].source if field in given else f"{field} (by default)"
                problems.append(f"{source}: {details['msg']}")
            else:
                problems.append(_wrong(str(details["loc"][0]), details["input"], given))
    return None


def _wrong(name: str, value: object, given: Mapping[str, Sourced]) -> str:
    expected = kind(Settings.model_fields[name]).expected
    shown = "the value" if name == "api_key" else repr(value)
    source = given[name].source if name in given else flag_name(name)
    where = source if source in (flag_name(name), environment_name(name)) else f"{source}: {name}"
    return f"{where}: {shown} is not {expected}"
