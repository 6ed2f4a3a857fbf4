"""What the fork server imports once, so that an engine process starts in hundredths of a second.

No CUDA context and no threads may come of it: the fork server's children are forks of this.
"""

import gc
import importlib

# Nothing of what stays is looked through while it is made, nor in the children, which would copy its pages.
gc.disable()
for module in (
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "reprise.engine.process",
):
    importlib.import_module(module)
gc.freeze()
gc.enable()
