"""An answer as it is written."""

import os

from reprise_client import Client

messages = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is use_cache?"},
]

with (
    Client(os.environ.get("BASE_URL", "http://127.0.0.1:8000"), api_key=os.environ.get("API_KEY")) as client,
    client.stream_chat(messages, seed=7, max_tokens=64) as stream,
):
    for chunk in stream:
        print(chunk.text, end="", flush=True)
        if chunk.usage is not None:
            print(f"\n{chunk.usage.completion_tokens} tokens")
