"""Rows and their lengths in tokens: of the tables of stages that are up to date, else of the data files.

Rows are counted all, up to `MOST_ROWS` of a file; lengths in tokens are those of a sample of them. What a stage that
has not run will make of the data (cleaning, leaks, ties) is not known before: then the numbers are those of the files.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_core.config import Params
from rlhf_core.config.data import SOURCE_ROWS
from rlhf_core.data.reading.kinds import Kind
from rlhf_core.data.reading.readers import Row, read_rows
from rlhf_core.data.reading.records import to_record
from rlhf_core.planning.workload import Workload, mean
from rlhf_core.text.identity import prompt_identity
from rlhf_core.text.tokenizer import encode_prompts, encode_whole_responses, load_tokenizer, train_tokenizer
from rlhf_core.text.transcripts import replies_of
from tasks import paths

MOST_ROWS, SAMPLED = 50_000, 256
Values = Mapping[str, Any]
Pair = tuple[str, str, str]
"""Prompt and two responses."""


def count(root: Path, params: Params, stale: Collection[str]) -> Workload:
    """Count the rows of a checkout and the tokens of a sample.

    Args:
        root: the checkout.
        params: its settings.
        stale: stages that are not up to date, whose tables are not looked at.
    """
    found = _Found(root, params, stale)
    demonstrations, pairs = found.demonstrations(), found.pairs()
    prompts, heldout = found.prompts()
    tokenizer = found.tokenizer(demonstrations or [(prompt, one) for prompt, one, _ in pairs])
    lengths = _Lengths(tokenizer, params)
    kept = round(params.sft.heldout_share * len(demonstrations))
    groups = _by_prompt(pairs)
    cap = params.preferences.max_pairs_per_prompt
    used = pairs if found.exact("preferences") else [pair for some in groups.values() for pair in some[:cap]]
    return Workload(
        demonstrations=len(demonstrations) - kept,
        kept=kept,
        demonstration_lengths=lengths.examples(_some(demonstrations)),
        pairs=len(used),
        groups=len(groups),
        group_lengths=lengths.groups([some[:cap] for some in _some([*groups.values()])]),
        heldout_pairs=found.heldout_pairs(len(used)),
        graded=found.graded(),
        prompts=len(prompts),
        heldout_prompts=len(heldout),
        prompt_lengths=lengths.prompts(_some(prompts)),
        sampled=SAMPLED,
        counted=found.sources,
        text_s=lengths.seconds / max(1, lengths.texts),
        characters=mean([len(prompt) + len(response) for prompt, response in _some(demonstrations)]),
        vocabulary=len(tokenizer),
    )


class _Found:
    """What there is to count: a table of a stage where that is up to date, else what the files give."""

    def __init__(self, root: Path, params: Params, stale: Collection[str]) -> None:
        self.root, self.params, self.stale = root, params, frozenset(stale)
        self.sources: dict[str, str] = {}
        self._read: dict[Kind, list[Values]] = {}

    def exact(self, stage: str) -> bool:
        """Whether a stage's tables are there and up to date."""
        return stage not in self.stale and (self.root / paths.stage_output(stage)).is_dir()

    @property
    def _labels_samples(self) -> bool:
        """Whether labels are given to what the models of this run write."""
        return bool(SOURCE_ROWS[self.params.label.source].simulated)

    def demonstrations(self) -> list[tuple[str, str]]:
        if self.exact("validate"):
            rows = self._table("demonstrations", paths.VALIDATE / "demonstrations.parquet")
            return [(row["prompt"], row["response"]) for row in rows if row["split"] == "train"]
        if self.params.data.demonstrations:
            found = [(row["prompt"], row["response"]) for row in self._file("demonstrations")]
        else:
            self.sources["demonstrations"] = "the chosen responses of the pairs"
            found = list(dict.fromkeys((prompt, chosen) for prompt, chosen, _ in self._file_pairs()))
        return self._training_part(found)

    def pairs(self) -> list[Pair]:
        """Training pairs; those that a stage has yet to sample are as many as it will, of texts of other rows."""
        if self.exact("preferences"):
            rows = self._table("pairs", paths.PREFERENCES / "train.parquet")
            return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows if not row.get("tie")]
        if self._labels_samples:
            return self._simulated()
        return self._training_part(self._file_pairs())

    def heldout_pairs(self, training: int) -> int:
        if self.exact("preferences"):
            return sum(1 for _ in self._table("held-out pairs", paths.PREFERENCES / "heldout.parquet"))
        generate, share = self.params.generate, self.params.data.hashed_share
        if self._labels_samples:
            return round(training * generate.num_heldout_prompts / max(1, generate.num_prompts))
        return round(training * share / (1 - share))

    def graded(self) -> int:
        if self.exact("validate"):
            return sum(1 for _ in self._table("graded", paths.VALIDATE / "graded.parquet"))
        return len(self._file("graded")) if self.params.data.graded else 0

    def prompts(self) -> tuple[list[str], list[str]]:
        """Training and held-out prompts, each once."""
        if self.exact("validate"):
            tables = (self._table(name, paths.VALIDATE / f"{name}.parquet") for name in ("prompts", "heldout_prompts"))
            train, heldout = ([row["prompt"] for row in rows] for rows in tables)
            return list(dict.fromkeys(train)), heldout
        data = self.params.data
        if data.prompts:
            texts = [row["prompt"] for row in self._file("prompts")]
        else:
            self.sources["prompts"] = "the prompts of other files"
            texts = [prompt for prompt, *_ in self._file_pairs()]
            texts = texts or [prompt for prompt, _ in self.demonstrations()]
        named = [row["prompt"] for row in self._file("heldout_prompts")] if data.heldout_prompts else []
        distinct = list({prompt_identity(text): text for text in texts}.values())
        train = self._training_part(distinct)
        return train, [*named, *distinct[len(train) :]]

    def tokenizer(self, texts: Sequence[tuple[str, str]]) -> PreTrainedTokenizerBase:
        """That of the folder, or of a stage `sft` that is up to date; else one trained on a sample of the texts."""
        cfg, made = self.params.model, self.root / paths.SFT / "model"
        if cfg.source == "folder":
            self.sources["tokenizer"] = cfg.path
            return load_tokenizer(self.root / cfg.path, cfg.chat)
        if self.exact("sft") and made.is_dir():
            self.sources["tokenizer"] = str(paths.SFT / "model")
            return load_tokenizer(made)
        self.sources["tokenizer"] = "trained on a sample"
        corpus = (text for prompt, response in _some(texts, 8 * SAMPLED) for text in (prompt, f" {response.strip()}"))
        return train_tokenizer(corpus, cfg.vocab_size)

    def _simulated(self) -> list[Pair]:
        """Every pair of the responses to a prompt, in texts of the demonstrations: those to come are not there yet."""
        cfg, texts = self.params.generate, self.demonstrations()
        self.sources["pairs"] = "generate.num_prompts prompts with all pairs of their responses"
        prompts = list(dict.fromkeys(self.prompts()[0]))[: cfg.num_prompts]
        count = cfg.responses_per_prompt
        pairs: list[Pair] = []
        for number, prompt in enumerate(prompts):
            own = [f"{texts[(number * count + place) % len(texts)][1]}" for place in range(count)] if texts else []
            pairs += [(prompt, own[one], own[other]) for one in range(count) for other in range(one)]
        return pairs

    def _file_pairs(self) -> list[Pair]:
        """Pairs that files of judgements name, in whichever order they judge them."""
        data, pairs = self.params.data, dict[Pair, None]()
        if data.comparisons:
            pairs |= dict.fromkeys(
                (row["prompt"], row["chosen"], row["rejected"]) for row in self._file("comparisons") if row["rejected"]
            )
        if data.rankings:
            for row in self._file("rankings"):
                own = row["responses"] or []
                pairs |= {(row["prompt"], own[one], own[two]): None for two in range(len(own)) for one in range(two)}
        if data.votes and not pairs:
            for row in self._file("votes"):
                pairs[(row["prompt"], *sorted((row["response_a"] or "", row["response_b"] or "")))] = None
        return list(pairs)

    def _training_part(self, rows: list[Any]) -> list[Any]:
        return rows[: round(len(rows) * (1 - self.params.data.hashed_share))]

    def _file(self, kind: Kind) -> list[Values]:
        """The good rows of a data file, up to a limit, which is said."""
        if kind not in self._read:
            path = self.root / getattr(self.params.data, kind)
            rows = (row for row in islice(read_rows(path), MOST_ROWS) if isinstance(row, Row))
            records = [to_record(kind, row) for row in rows]
            self._read[kind] = [one.values for one in records if not one.problem and one.values["prompt"]]
            first = f", the first {MOST_ROWS:,} rows" if len(records) >= MOST_ROWS else ""
            self.sources[kind] = f"{getattr(self.params.data, kind)}{first}"
        return self._read[kind]

    def _table(self, what: str, path: Path) -> Iterator[Values]:
        from tasks.tables import Rows

        self.sources[what] = str(path)
        yield from Rows(self.root / path)


class _Lengths:
    """Lengths in tokens, cut as the stages cut; notes how long it takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: Params) -> None:
        self._tokenizer, self._limits, self._turns = tokenizer, params.model, params.sft.turns
        self.seconds, self.texts = 0.0, 0

    def prompts(self, texts: Sequence[str]) -> list[int]:
        encode = lambda some: encode_prompts(self._tokenizer, some, self._limits.max_prompt_tokens)  # noqa: E731
        return [len(ids) for ids in self._timed(encode, texts)]

    def examples(self, rows: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """(read alone, read and perhaps learned) of each demonstration; of a dialogue all turns are the second."""
        whole = list(
            zip(self.prompts([prompt for prompt, _ in rows]), self._responses([one for _, one in rows]), strict=True)
        )
        if self._turns == "last":
            return whole
        first = self.prompts([replies_of(prompt, response)[0][0] for prompt, response in rows])
        return [
            (min(start, prompt), prompt - min(start, prompt) + one)
            for (prompt, one), start in zip(whole, first, strict=True)
        ]

    def groups(self, groups: Sequence[Sequence[Pair]]) -> list[list[int]]:
        """Prompt and distinct responses of each group of pairs."""
        prompts = self.prompts([pairs[0][0] for pairs in groups])
        texts = [list(dict.fromkeys(one for _, *two in pairs for one in two)) for pairs in groups]
        lengths = iter(self._responses([text for own in texts for text in own]))
        return [[prompt, *islice(lengths, len(own))] for prompt, own in zip(prompts, texts, strict=True)]

    def _responses(self, texts: Sequence[str]) -> list[int]:
        limit = self._limits.max_response_tokens
        encode = lambda some: encode_whole_responses(self._tokenizer, some, limit)  # noqa: E731
        return [limit if ids is None else len(ids) for ids in self._timed(encode, texts)]

    def _timed(self, encode: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> Any:
        start = time.process_time()
        found = encode(texts) if texts else []
        self.seconds, self.texts = self.seconds + time.process_time() - start, self.texts + len(texts)
        return found


def _by_prompt(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair[0], []).append(pair)
    return groups


def _some(rows: Sequence[Any], most: int = SAMPLED) -> list[Any]:
    """At most so many of the rows, evenly from all of them."""
    step = max(1.0, len(rows) / most)
    return [rows[int(place * step)] for place in range(min(most, len(rows)))]
