"""Text and token ids: tokenizer, chat template, and the incremental decoders with `feed()` and `flush()`."""
