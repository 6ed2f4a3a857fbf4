"""Convert a model directory to GGUF with the converter of a llama.cpp checkout, for the peers' benchmark.

The converter knows tokenizers by a hash of what they make of a text, and refuses those that it has never seen.
The tokenizers of `benchmarks.shapes` split text as GPT-2's does, so that name is given by hand, and the search for
a SentencePiece model, which needs another package, is left out.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from pathlib import Path


def convert(checkout: Path, model: Path, output: Path) -> None:
    """Write bfloat16 GGUF. Raises whatever the converter raises."""
    sys.path[:0] = [str(checkout / "gguf-py"), str(checkout)]
    conversion = importlib.import_module("conversion.base")
    conversion.TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "gpt-2"
    conversion.TextModel._set_vocab_sentencepiece = lambda model: model._set_vocab_gpt2()  # noqa: SLF001 # its own names
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outfile", str(output), "--outtype", "bf16"]
    runpy.run_path(str(checkout / "convert_hf_to_gguf.py"), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="directory of llama.cpp's source")
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("output", type=Path, help="file to write")
    arguments = parser.parse_args()
    convert(arguments.checkout, arguments.model, arguments.output)


if __name__ == "__main__":
    main()
