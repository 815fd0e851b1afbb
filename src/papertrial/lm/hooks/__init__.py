"""Record and patch activations of any known model by the name of the site, without touching model code.

Sites: :mod:`papertrial.lm.hooks.sites`. Attention patterns are not here but in :mod:`papertrial.lm.attention`.
"""

from papertrial.lm.hooks.patching import Edit, add, change, patch, replace, scale
from papertrial.lm.hooks.recording import Recording, record
from papertrial.lm.hooks.sites import BLOCK_SITES, HEAD_SITES, SITES

__all__ = [
    "BLOCK_SITES",
    "HEAD_SITES",
    "SITES",
    "Edit",
    "Recording",
    "add",
    "change",
    "patch",
    "record",
    "replace",
    "scale",
]
