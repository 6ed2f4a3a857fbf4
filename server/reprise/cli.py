"""The command `reprise`. Nothing here or imported at its top may import torch, transformers or fastapi."""

from __future__ import annotations

import dataclasses
import difflib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from reprise import __version__
from reprise.config import ResolvedSettings, resolve_settings
from reprise.errors import BundleError, ConfigError
from reprise.exit_code import ExitCode
from reprise.generation.fork_server import start_fork_server
from reprise.generation.supervision import HangLimits
from reprise.ipc.messages import EngineConfig
from reprise.printable import printable
from reprise.replay.bundle import Bundle, read_bundle
from reprise.settings import Settings, environment_name, is_switch, kind


class SettingOption(click.Option):
    """The flag of one setting. Values stay text: the settings judge them, all at once."""

    def __init__(self, name: str, *, of_server: bool = True) -> None:
        """of_server: the help names the variable and the default, which hold for a server."""
        field = Settings.model_fields[name]
        dashed = name.replace("_", "-")
        switch = is_switch(field)
        default = field.get_default(call_default_factory=True)
        notes = [f"env: {environment_name(name)}"]
        if default is not None and default != []:
            notes.append(f"default: {_spelt(default)}")
        super().__init__(
            [f"--{dashed}/--no-{dashed}" if switch else f"--{dashed}", name],
            type=bool if switch else str,
            default=None,
            multiple=isinstance(default, list),
            metavar=None if switch else kind(field).metavar,
            help=f"{field.description}  [{'; '.join(notes)}]" if of_server else field.description,
        )
        extra = field.json_schema_extra
        self.group = str(extra["group"]) if isinstance(extra, dict) else ""


class SettingsCommand(click.Command):
    """A command that takes every setting, the flags under the settings' own headings in its help."""

    def __init__(self, **attributes: Any) -> None:
        settings = [SettingOption(name) for name in Settings.model_fields if name != "model"]
        model = click.Argument(["model"], required=False)
        config = click.Option(
            ["--config"],
            type=click.Path(path_type=Path),
            metavar="FILE",
            envvar="REPRISE_CONFIG",
            help="YAML file of settings, named as the flags with _ for -.  [env: REPRISE_CONFIG]",
        )
        super().__init__(params=[model, config, *settings, *attributes.pop("params", [])], **attributes)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name == "--model":
                raise click.UsageError("The model is no option but the argument: reprise serve MODEL", ctx) from None
            nearest = difflib.get_close_matches(error.option_name, error.possibilities or [], n=1)
            raise click.NoSuchOption(error.option_name, possibilities=nearest, ctx=ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                group = param.group if isinstance(param, SettingOption) else "General"
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records, col_max=36)


class ReplayCommand(SettingsCommand):
    """A command that takes the settings of a bundle, the model among them, and when an engine counts as hung."""

    def __init__(self, **attributes: Any) -> None:
        of_engines = {*EngineConfig.__struct_fields__, *(field.name for field in dataclasses.fields(HangLimits))}
        names = [name for name in Settings.model_fields if name in of_engines]
        settings = [SettingOption(name, of_server=False) for name in names]
        super(SettingsCommand, self).__init__(params=[*attributes.pop("params", []), *settings], **attributes)


def _spelt(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int) and value % 1024**2 == 0 and value:
        return f"{value // 1024**2}MiB"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _resolve(config: Path | None, flags: dict[str, Any]) -> ResolvedSettings:
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    return resolve_settings(given, os.environ, config)


@click.group(
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog="`reprise serve` serves the bundled model; `reprise serve --help` lists every setting.",
)
@click.version_option(__version__, prog_name="reprise", message="%(prog)s %(version)s")
def cli() -> None:
    """An OpenAI-compatible server for any Hugging Face causal language model, whose answers repeat."""


@cli.command(cls=SettingsCommand, name="serve", short_help="Serve a model over HTTP.")
def serve_command(config: Path | None, **flags: Any) -> None:
    """Serve MODEL, a directory or a Hugging Face id, over HTTP. Without MODEL: pocket, which comes along.

    A setting is taken from its flag, else from its environment variable, else from the --config file, else it
    has its default. A list is a flag given several times, or a variable with commas in it.

    Exit codes: 0 ended as asked; 1 the engine was lost, or a shutdown had to cut requests off after drain_timeout;
    2 settings unusable; 3 model not loadable.
    """
    resolved = _resolve(config, flags)
    if Path(resolved.settings.model_path).is_dir():  # else whether the hub can be reached is for it to know
        start_fork_server()  # it imports for longer than this process does
    gc.disable()  # until all is there that stays: see `api.server.serve`
    try:
        from reprise.serve import run

        code = run(resolved.settings, chat_template=resolved.chat_template)
    finally:
        gc.enable()
    sys.exit(code)


@cli.command(cls=SettingsCommand, name="config", short_help="Show the settings that `serve` would use.")
def config_command(config: Path | None, **flags: Any) -> None:
    """Show the settings that `reprise serve` would use with the same arguments, as YAML with their sources.

    Nothing is loaded and nothing is started. Keys are not shown.
    """
    resolved = _resolve(config, flags)
    for name, value in resolved.settings.model_dump(mode="json").items():
        click.echo(f"{name}: {json.dumps(value, ensure_ascii=False)}  # {resolved.sources.get(name, 'default')}")


@cli.command(cls=ReplayCommand, name="replay", short_help="Run bundles again and show the first difference.")
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--times", metavar="N", type=click.IntRange(1), default=1, help="Run each N times, until one differs.")
@click.option(
    "--company", metavar="K", type=click.IntRange(0, 4096), default=0, help="Run K random requests beside it."
)
@click.option("--no-cache", is_flag=True, help="Reuse nothing, at no step.")
@click.option("--ignore-fingerprint", is_flag=True, help="Go on with other weights than the bundle's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line a bundle.")
def replay_command(
    *,
    bundles: tuple[Path, ...],
    times: int,
    company: int,
    no_cache: bool,
    ignore_fingerprint: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Run the responses of BUNDLE files again, compare them bit by bit, and show the first difference.

    `reprise serve --bundle-dir` writes the files. What no flag sets is as in the bundle: the model, the device, the
    number format and the other settings. A bundle that cannot be run is told, and the others are run.

    Exit codes: 0 identical; 1 something differs; 2 a flag is unusable, or a bundle is or could not be run; 3 the
    model is not loadable, or not the bundle's. Of several bundles the highest counts.
    """
    read = [(path, read_bundle(path)) for path in bundles]
    given = {name: value for name, value in flags.items() if value is not None}
    work = [(path, bundle, _settings_of(bundle, given)) for path, bundle in read]
    from reprise.replay_command import Circumstances, run

    circumstances = Circumstances(times, not no_cache, company, ignore_fingerprint)
    sys.exit(run(work, circumstances, as_json=as_json))


def _settings_of(bundle: Bundle, flags: dict[str, Any]) -> Settings:
    """Those of the server that wrote the bundle, but for what flags set. Raises ConfigError."""
    recorded = {name: getattr(bundle.settings, name) for name in bundle.settings.__struct_fields__}
    known = {name: value for name, value in recorded.items() if value is not None}
    return resolve_settings(known | flags, {}, None).settings


def main() -> None:
    """Entry point of the command."""
    try:
        cli()
    except (ConfigError, BundleError) as error:
        click.echo(printable(f"reprise: {error}"), err=True)
        sys.exit(ExitCode.CONFIG)


if __name__ == "__main__":
    main()
