"""The whole job on one model, with every number measured in the run that shows it.

At 4 bits (bitsandbytes NF4) and at 2 bits (our packed layers) the same short fine-tune starts once from zero, as
QLoRA does, and once from LoftQ. The 4-bit LoftQ adapter is then saved, reloaded on a base read back from disk, and
merged into 16, 32 and 4 bits.

It shows what the public functions do and adds nothing to them: whatever a user couldn't write has no place here.

- ``run``: the stages, and ``run_demo``, which is their order
- ``settings``: what a run depends on
- ``models``: getting the model, dense or of few bits
- ``text``: text to fine-tune on
- ``training``: the fine-tune, and measuring perplexity
- ``results``: what was measured, as plain values
- ``report``: tables, a plot, JSON
"""

from .models import reference_model_path
from .report import show, write_reports
from .results import FineTune, Generation, Merged, Reload, Result
from .run import run_demo
from .settings import Settings
from .text import make_windows
from .training import perplexity

__all__ = [
    "FineTune",
    "Generation",
    "Merged",
    "Reload",
    "Result",
    "Settings",
    "make_windows",
    "perplexity",
    "reference_model_path",
    "run_demo",
    "show",
    "write_reports",
]
