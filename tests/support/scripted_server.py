"""A server over a scripted engine, as a process that can be sent signals: `python -m support.scripted_server`.

Arguments: model directory, port, drain timeout in seconds. A chat whose message is "wait" gets one delta, and the
rest after the signal SIGUSR1; anything else is answered at once.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

from reprise.api.app import create_app
from reprise.api.server import serve
from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer
from reprise.types import ChoiceDelta, FinishReason, GenerationRequest
from support.scripted_engine import ScriptedEngine, ScriptedStream


class PatientEngine(ScriptedEngine):
    def submit(self, request: GenerationRequest) -> ScriptedStream:
        if "wait" in self.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True):
            go_on = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, go_on.set)
            first = ChoiceDelta(index=0, text="begun")
            self.enqueue([first, go_on, ChoiceDelta(index=0, finish_reason=FinishReason.STOP)])
        return super().submit(request)


def main(model: str, port: str, drain_timeout: str) -> int:
    tokenizer = Tokenizer.load(model)
    settings = Settings(port=int(port), drain_timeout=float(drain_timeout))
    app = create_app(settings, tokenizer, PatientEngine(tokenizer), [settings.host])
    return uvloop.run(serve(app, settings, on_started=lambda: print("started", flush=True)))  # noqa: T201 - for the test


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
