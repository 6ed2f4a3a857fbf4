"""One question, one answer, and what it cost."""

import os

from reprise_client import Client

with Client(os.environ.get("BASE_URL", "http://127.0.0.1:8000"), api_key=os.environ.get("API_KEY")) as client:
    completion = client.chat("What is the capital of France?", temperature=0, max_tokens=64)
    print(completion.text)
    print(f"{completion.usage.prompt_tokens} + {completion.usage.completion_tokens} tokens")
