"""What an operator is told at start: what is allowed, but perhaps not meant."""

from __future__ import annotations

import logging
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from reprise.settings import Settings

SHORT_KEY = 8
"""Characters."""


class Notice(NamedTuple):
    """A sentence for the operator, and its level as `logging` counts them."""

    level: int
    text: str


def startup_notices(settings: Settings, *, in_container: bool) -> list[Notice]:
    """Notices on settings that are allowed but perhaps not meant.

    In a container all addresses are the right ones to listen on: who can reach them is decided where its port is
    published, which cannot be seen from inside.
    """
    notices = []
    if settings.draft_model is not None and settings.draft_model_path is None:
        notices.append(
            Notice(logging.WARNING, "draft_model is without effect: it takes speculate: draft, --speculate draft")
        )
    if any(len(key.get_secret_value()) < SHORT_KEY for key in settings.api_key):
        notices.append(
            Notice(
                logging.WARNING,
                f"an API key has fewer than {SHORT_KEY} characters, and can be guessed (commas part the keys of"
                " REPRISE_API_KEY)",
            )
        )
    if not _is_wildcard(settings.host) or settings.api_key:
        return notices
    if in_container:
        return [
            *notices,
            Notice(
                logging.INFO,
                f"no API key is set: whoever reaches port {settings.port} of this container, where it is published,"
                f" can use this server. Publish it as 127.0.0.1:{settings.port}:{settings.port}, or set"
                " REPRISE_API_KEY.",
            ),
        ]
    return [
        *notices,
        Notice(
            logging.WARNING,
            f"listening on all addresses ({settings.host}) without an API key: whoever reaches port"
            f" {settings.port} can use this server. Set REPRISE_API_KEY or --api-key-file,"
            " or --host 127.0.0.1.",
        ),
    ]


def in_container() -> bool:
    """Whether Docker or Podman runs this process."""
    return any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))


def _is_wildcard(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False
