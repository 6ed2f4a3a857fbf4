"""Domain errors. `api/errors.py` maps them to HTTP, once.

RepriseError
 ├── InvalidRequestError     the client's doing: names the parameter and says what would be right
 │    ├── ContextLengthError    prompt and output cannot fit
 │    └── ModelNotFoundError    no such model is served here
 ├── OverloadedError         admitted work is at its limit: try again later
 ├── UnavailableError        no engine: loading, draining, restarting or lost
 ├── GenerationError         one sequence failed in the engine
 ├── ConfigError             a setting is wrong (exit 2)
 ├── BundleError             a file that is no bundle, or one that cannot be run again here (exit 2)
 └── ModelLoadError          weights or tokenizer cannot be served (exit 3)
"""

from __future__ import annotations


class RepriseError(Exception):
    """Anything that Reprise itself raises on purpose."""


class InvalidRequestError(RepriseError):
    """A request that can never succeed as it is.

    `param` is the request field in the client's own spelling (dotted for nested ones), `code` a word.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """The prompt leaves no room in the context, or the KV pool can never hold it."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that is not served here."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_found")


class OverloadedError(RepriseError):
    """The queue is full. `retry_after` is in whole seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(RepriseError):
    """There is no engine to serve the request: loading, draining, restarting or lost. `retry_after` in seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class GenerationError(RepriseError):
    """A sequence ended in an error; `code` is a word for it (`numerical_error`, `no_admissible_token`, …)."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class ConfigError(RepriseError):
    """Settings that cannot be used; the message lists every problem with its source."""


class BundleError(RepriseError):
    """A bundle that cannot be read, or not be run again; the message names the file or field and what is wrong."""


class ModelLoadError(RepriseError):
    """A model that cannot be served; the message names the file, tensor or setting and the remedy."""
