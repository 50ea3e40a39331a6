"""`python -m engine.train`, alone or under torchrun: trains a GPT-2 with background checkpoints.

Exit status: 0 at the end of the run, or after a signal with the last step saved; 2 when the user has to act
(one sentence says what to do); 128 + n when signal n left no time to save. torchrun turns any failure into 1.
"""

from __future__ import annotations

from engine.run.entry import enter

if __name__ == "__main__":
    enter("engine.train.session")
