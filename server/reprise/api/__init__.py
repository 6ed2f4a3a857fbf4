"""The HTTP side: routes between OpenAI's wire and `generation`, and what surrounds them."""
