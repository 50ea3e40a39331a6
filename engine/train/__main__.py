"""`python -m engine.train`, alone or under torchrun: trains a GPT-2 with background checkpoints.

Exit status: 0 at the end of the run and after a signal that left a checkpoint, 2 when the user has to do
something (one sentence says what), 128 + n when signal n left no time to save. torchrun makes it 1.
"""

from __future__ import annotations

from engine.run.entry import enter

if __name__ == "__main__":
    enter("engine.train.session")
