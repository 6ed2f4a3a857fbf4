"""Several questions at the same time: the server answers them in one batch."""

import asyncio
import os

from reprise_client import AsyncClient

QUESTIONS = ["What is 2 + 3?", "What is the capital of Japan?", "你好！"]


async def answer(client: AsyncClient, question: str) -> str:
    async with await client.stream_chat(question, temperature=0, max_tokens=64) as stream:
        return "".join([chunk.text async for chunk in stream])


async def main() -> None:
    base_url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
    async with AsyncClient(base_url, api_key=os.environ.get("API_KEY")) as client:
        answers = await asyncio.gather(*(answer(client, question) for question in QUESTIONS))
    for question, text in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {text}")


asyncio.run(main())
