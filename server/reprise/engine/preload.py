"""What the fork server imports once, so that an engine process starts in hundredths of a second.

No CUDA context and no threads may come of it: the fork server's children are forks of this.
"""

import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import reprise.engine.core
import reprise.engine.loader  # noqa: F401
