"""Training batches: shuffled windows of a stream of tokens.

Window w holds the tokens [w·T, w·T + T], the last of which is only a target. The batch of a step depends on
(seed, step) alone, so that a run can be taken up again from its step number.

Letters: B batch, T sequence.
"""

import numpy as np

from nemoe_jax.text import count_windows, cut


class TrainingBatches:
    """Batches of shuffled windows, each epoch in an order of its own; `batch` depends on the step alone."""

    def __init__(self, stream: np.ndarray, sequence_length: int, batch_size: int, seed: int):
        self.stream, self.sequence_length, self.batch_size, self.seed = stream, sequence_length, batch_size, seed
        self.windows = count_windows(stream, sequence_length, "data.train")
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> np.ndarray:
        """The tokens (B, T + 1), int32, of a step counted from 0."""
        first = step * self.batch_size
        windows = [self._window(place) for place in range(first, first + self.batch_size)]
        return cut(self.stream, np.array(windows) * self.sequence_length, self.sequence_length)

    def _window(self, place: int) -> int:
        epoch, index = divmod(place, self.windows)
        if epoch != self._epoch:  # only a cache: the order depends on (seed, epoch)
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows)
        return int(self._order[index])
