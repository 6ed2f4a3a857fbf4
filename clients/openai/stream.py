"""Streaming with the official OpenAI SDK."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("API_KEY", "none"),
)

with client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "How do I stream an answer?"}],
    stream=True,
    stream_options={"include_usage": True},
    max_tokens=64,
) as stream:
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage is not None:
            print(f"\n{chunk.usage.completion_tokens} tokens")
client.close()
