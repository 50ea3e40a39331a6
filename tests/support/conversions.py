"""Import and export with the example's GPT-2, as `python -m engine.checkpoints` calls them."""

from __future__ import annotations

from functools import partial

from engine.convert import export
from engine.convert import import_checkpoint as importing
from engine.gpt2.kind import GPT2_KIND

import_checkpoint = partial(importing.import_checkpoint, kinds=(GPT2_KIND,))
export_checkpoint = partial(export.export_checkpoint, kinds=(GPT2_KIND,))
