"""The Hugging Face hub: whether a model comes from it, whether it can be reached, whether it has the model.

huggingface_hub reads its environment when it is imported, so nothing here imports it at its top.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from reprise.errors import ModelLoadError
from reprise.text.model_files import check_model_place

DEFAULT_ENDPOINT = "https://huggingface.co"
OFFLINE = "HF_HUB_OFFLINE"
REACH_SECONDS = 3.0
"""Time for the hub's name to resolve and its port to answer. huggingface_hub alone tries for 49 s."""

logger = logging.getLogger(__name__)


def comes_from_hub(model: str) -> bool:
    """Whether `model` is a hub id, not a directory. Raises ModelLoadError for a path at which no model can be."""
    check_model_place(model)
    return not Path(model).is_dir()


def go_offline_if_unreachable(environ: MutableMapping[str, str]) -> str | None:
    """Set HF_HUB_OFFLINE where the hub does not answer, so that its cache is used at once. Returns why it does not.

    Nothing is tried where HF_HUB_OFFLINE is set already, be it to 0. For the time before huggingface_hub is
    imported, here or in a child.
    """
    if environ.get(OFFLINE) or environ.get("TRANSFORMERS_OFFLINE"):
        return None
    cause = _unreachable(endpoint(environ))
    if cause is not None:
        environ[OFFLINE] = "1"
    return cause


def endpoint(environ: Mapping[str, str]) -> str:
    return environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT


def find_on_hub(model: str, revision: str | None, *, unreachable: str | None) -> None:
    """Make sure that the hub, or its cache on this machine, has a model.

    unreachable: what `go_offline_if_unreachable` found. Raises ModelLoadError.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        hf_hub_download(model, "config.json", revision=revision)
    except errors.LocalEntryNotFoundError as error:
        raise _missing(model, f"{_unasked(unreachable, error)}, and its cache on this machine has no such model") from (
            error
        )
    except errors.HFValidationError as error:
        raise _missing(model, "the hub's ids look like 'org/name', so it is none of those either") from error
    except errors.GatedRepoError as error:
        raise _missing(
            model, "the hub wants its terms accepted there first, and a token of who did in HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise _missing(model, f"the hub's model of that name has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise _missing(model, "the hub has no such model, or shows it to its owners alone, who set HF_TOKEN") from error
    except errors.EntryNotFoundError as error:
        raise _missing(model, "the hub's repository of that name has no config.json, so it is no model") from error
    except (OSError, ValueError) as error:
        raise _missing(model, f"the hub did not give it: {_one_line(error)}") from error
    if unreachable is not None:
        logger.warning("the hub cannot be reached (%s): what its cache on this machine has is served", unreachable)


def _missing(model: str, cause: str) -> ModelLoadError:
    return ModelLoadError(f"There is no directory {model!r}, and {cause}.")


def _unasked(unreachable: str | None, error: Exception) -> str:
    from huggingface_hub.constants import is_offline_mode

    if unreachable is not None:
        return f"the hub cannot be reached ({unreachable}; {OFFLINE}=0 has it asked all the same)"
    if is_offline_mode():
        return f"the hub is not asked because {OFFLINE} is set"
    return f"the hub did not answer ({_one_line(error.__cause__ or error)})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _unreachable(url: str) -> str | None:
    """Why no connection to a URL's host can be had; None where one can, or where a proxy would be asked instead."""
    address = urlsplit(url)
    host, port = address.hostname, address.port or (80 if address.scheme == "http" else 443)
    if host is None or ({address.scheme, "all"} & getproxies().keys() and not proxy_bypass(host)):
        return None
    answers: queue.SimpleQueue[OSError | list[str] | None] = queue.SimpleQueue()

    def ask(function: Callable[[str, int], list[str] | None], name: str) -> None:
        def call() -> None:
            try:
                answers.put(function(name, port))
            except OSError as error:
                answers.put(error)

        # In a thread, for looking up a name has no time limit of its own.
        threading.Thread(target=call, name="reach-hub", daemon=True).start()

    ask(_addresses, host)
    num_asked, cause, deadline = 1, "", time.monotonic() + REACH_SECONDS
    while num_asked:
        try:
            answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return f"{host} did not answer within {REACH_SECONDS:g} s"
        num_asked -= 1
        if answer is None:
            return None
        if isinstance(answer, OSError):
            cause = f"{host}: {answer.strerror or answer}"
            continue
        # All at once: where IPv6 leads nowhere, the other address answers.
        for found in answer:
            ask(_connect, found)
        num_asked += len(answer)
    return cause


def _addresses(host: str, port: int) -> list[str]:
    """Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _connect(address: str, port: int) -> None:
    """Raises OSError where nobody answers there."""
    socket.create_connection((address, port), timeout=REACH_SECONDS).close()
