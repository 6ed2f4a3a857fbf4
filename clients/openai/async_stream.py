"""Several streams at once with the official OpenAI SDK's asynchronous client."""

import asyncio
import os

from openai import AsyncOpenAI

QUESTIONS = ["What is 2 + 3?", "What is the capital of Japan?", "你好！"]


async def answer(client: AsyncOpenAI, model: str, question: str) -> str:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        stream=True,
        temperature=0,
        max_tokens=64,
        extra_body={"top_k": 50},
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def main() -> None:
    async with AsyncOpenAI(
        base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000") + "/v1",
        api_key=os.environ.get("API_KEY", "none"),
    ) as client:
        model = (await client.models.list()).data[0].id
        answers = await asyncio.gather(*(answer(client, model, question) for question in QUESTIONS))
    for question, text in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {text}")


asyncio.run(main())
