"""The official OpenAI SDK, and the parameters that are Reprise's own: they go into `extra_body`."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("API_KEY", "none"),
)
model = client.models.list().data[0].id

completion = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0.7,
    seed=7,
    max_tokens=64,
    extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "use_cache": True},
)
print(completion.choices[0].message.content)

text = client.completions.create(
    model=model,
    prompt="Hello",
    max_tokens=16,
    temperature=0,
    extra_body={"min_tokens": 4, "bad_words": ["Paris"]},
)
print(text.choices[0].text)
client.close()
