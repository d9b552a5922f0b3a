"""A thread that scores responses, one request after the other, the responses of a request together."""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch

from rlhf_core.engine.batches import by_length, collate
from rlhf_core.errors import EnvironmentProblem, check_finite
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.serving.worker import CLOSING


class ToScore(NamedTuple):
    """Tokens of a prompt and of a response to it."""

    prompt: list[int]
    response: list[int]


class ScoringThread:
    """A reward model at work beside whatever else the process does.

    Args:
        model: in evaluation mode, on the device where it is to run; does not change.
        pad_id: fills rows of unequal length.
        rows_at_once: of a forward pass.
    """

    def __init__(self, model: RewardModel | RewardEnsemble, pad_id: int, rows_at_once: int = 32) -> None:
        self._model, self._pad_id, self._rows_at_once = model, pad_id, rows_at_once
        self._device = next(model.parameters()).device
        self._asked: queue.SimpleQueue[tuple[Sequence[ToScore], Future[list[float]]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[ToScore]) -> "Future[list[float]]":
        """Standardised scores of responses, in their order, once their turn has come.

        Raises:
            EnvironmentProblem: the thread is closed.
        """
        future: Future[list[float]] = Future()
        with self._lock:
            if self._is_closed:
                raise EnvironmentProblem(CLOSING)
            self._asked.put((rows, future))
        return future

    @property
    def waiting(self) -> int:
        """How many requests have not been taken up yet."""
        return self._asked.qsize()

    def close(self) -> None:
        """Answer what was asked, take no more, and end."""
        with self._lock:
            self._is_closed = True
            self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            rows, future = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._scores(rows))
            except Exception as error:  # whoever asked gets it: out of memory, scores that are no numbers
                future.set_exception(error)

    @torch.inference_mode()
    def _scores(self, rows: Sequence[ToScore]) -> list[float]:
        scores = [0.0] * len(rows)
        for places in by_length([len(row.prompt) + len(row.response) for row in rows], self._rows_at_once):
            some = [rows[place] for place in places]
            batch = collate([row.prompt for row in some], [row.response for row in some], self._pad_id)
            found = self._model(batch.to(self._device)).tolist()
            check_finite(found, "the score of response", "look at the reward model's weights")
            for place, score in zip(places, found, strict=True):
                scores[place] = score
        return scores
