"""The stages of data preparation, from raw files to data sets.

    scan       which records PubMed's files hold                 scan/NNNNN.npz
    fold       which of them count (the last version of each)    fold/NNNNN.npy
    documents  one task an input file; notes come in parts       documents/<source>/NNNNN.parquet
                                                                 documents/<source>/NNNNN-PPPP.…
    evaluation … kept  what is left out, and the split (`data_prep.cleaning`)
                                                                 kept/<split>/<source>/….parquet
    statistics numbers of the kept documents for the data card   statistics/<split>/<source>/…json
    sample     training documents to train the tokenizer on      sample/<source>/….parquet
    tokenizer  trained on them, or copied                        tokenizer/
    tokens     ids of every kept document                        tokens/<split>/<source>/…/
    plan-L     which documents share a row, for each max_length  plan-L/<split>/<source>/NNNNN/
    rows-L     the data set; its manifest comes last             rows-L/

Every stage is a list of tasks (`data_prep.stages`) that need nothing but the stages before, so that
tasks can run in any order and anywhere (`data_prep.executors`), and what is done is not done again.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.counter_random import derive_key
from common.files import file_hash, only_user_of, remove_leftovers, wait_for_workers
from data_prep import codes, mimic, tasks
from data_prep.card.statistics import write_statistics
from data_prep.cleaning import Cleaning
from data_prep.config import DataPrep, check
from data_prep.document import InputError, read_documents
from data_prep.executors import Work, run_stage
from data_prep.inputs import DocumentFile, Input, find_evaluation_inputs, find_inputs
from data_prep.manifest import write_manifest
from data_prep.rows import PLAN_FILES, Part, RowShape, RowTokens, plan_parts, rows_in, write_plan
from data_prep.run_file import Run, read_run, write_run
from data_prep.shard_writer import shard_name, token_dtype
from data_prep.shards import TOKENIZER_FILE, index_path_of
from data_prep.slurm import end_leftover_jobs
from data_prep.split import SPLITS, TRAIN
from data_prep.stage_keys import Settings, all_lengths, stage_keys, withdraw_what_is_stale
from data_prep.stages import Counts, Stage, Task, summed_counts
from data_prep.token_files import FILES as TOKEN_FILES
from data_prep.token_files import TokenFile
from data_prep.tokenizer_sample import share_to_draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LOG = logging.getLogger(__name__)


def run(config: DataPrep) -> dict[Path, dict[str, Any]]:
    """Do everything that is not done yet; returns the manifest of each data set by its folder.

    Raises ConfigError for a key, InputError for an input, an OSError for a disk that is full and
    the like, and TaskFailed for a defect. From the start on, no data set in `out_dir` has a
    manifest unless it is what `config` and the inputs say. FolderInUse, an OSError, while another
    process works in `out_dir`.
    """
    with only_user_of(config.out_dir):
        _end_earlier_work(config)
        return _run(config)


def find_run(config: DataPrep) -> tuple[Run, Settings]:
    """The run that `config` asks for, with the inputs there are now, and its stages' settings.

    Raises ConfigError and InputError for a configuration and inputs that cannot be used.
    """
    check(config)
    inputs, evaluation_inputs = find_inputs(config), find_evaluation_inputs(config)
    existing = _existing_tokenizer(config)
    keys, settings = stage_keys(config, inputs, evaluation_inputs, existing, all_lengths(config))
    return Run(config, inputs, evaluation_inputs, keys), settings


def _run(config: DataPrep) -> dict[Path, dict[str, Any]]:
    found, settings = find_run(config)
    pipeline = Pipeline(found)
    withdraw_what_is_stale(config, found.keys, settings)
    name = write_run(found)

    def do(stage: Stage) -> list[Counts]:
        return run_stage(
            stage, Work(config.out_dir.absolute(), name, stage.name, stage.key), config
        )

    manifests = {}
    for stage in pipeline.stages():
        counts = do(stage)
        kind, _, length = stage.name.partition("-")
        if kind == "documents":
            pipeline.warn_of_note_counts(counts)
        elif kind == "kept":
            pipeline.require_documents()
        elif kind == "tokenizer" and config.tokenizer.existing is None:
            require_one_redaction_token(config, tasks.load_tokenizer(pipeline.tokenizer_folder)[0])
        elif kind == "rows":
            manifests[stage.folder] = pipeline.write_manifest(int(length), counts)
    return manifests


def _end_earlier_work(config: DataPrep) -> None:
    """Wait for tasks whose command was killed, and remove what killed ones have left."""
    end_leftover_jobs(config.out_dir)

    def say_so() -> None:
        _LOG.warning("waiting for tasks that an earlier run in %s has left", config.out_dir)

    wait_for_workers(config.out_dir, say_so)
    remove_leftovers(config.out_dir)


def _existing_tokenizer(config: DataPrep) -> dict[str, Any] | None:
    """The description of the tokenizer that the configuration names, if it names one."""
    if config.tokenizer.existing is None:
        return None
    from data_prep import tokenizer as tokenizers

    found = tokenizers.load_tokenizer(config.tokenizer.existing)
    require_one_redaction_token(config, found)
    return tokenizers.describe(found)


def require_one_redaction_token(config: DataPrep, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raise InputError when `redaction` is several tokens of `tokenizer`."""
    from data_prep.tokenizer import encode

    mark = config.redaction
    if mark is None:
        return
    # In a vocabulary whose words carry the space before them it is one with the space, too.
    pieces = min(len(ids) for ids in encode(tokenizer, [mark, f" {mark}"]))
    if pieces != 1:
        raise InputError(
            f"redaction = {mark!r} is {pieces} tokens of the tokenizer "
            f"({config.tokenizer.existing or config.out_dir / 'tokenizer'}); choose one "
            "character that notes do not use, such as █, or a word of its vocabulary"
        )


class Pipeline:
    """The stages of a run; the tasks of a stage are known once those before are done."""

    def __init__(self, run: Run) -> None:
        self.config = run.config
        self.out = run.config.out_dir
        self._all_inputs = run.inputs
        # Those that documents are made of.
        self.inputs = [source for source in run.inputs if source.kind != codes.HEADINGS]
        self.evaluation_inputs = run.evaluation_inputs
        self.keys = run.keys
        self.cleaning = Cleaning(
            self.config, lambda: self.files, self.evaluation_inputs, self._stage
        )

    @staticmethod
    def of_run(out_dir: Path, name: str) -> "Pipeline":
        """The stages of the run `name` that `out_dir` describes."""
        return _pipeline_of_run(out_dir, name)

    def stage_names(self) -> list[str]:
        """The stages that the configuration asks for, in their order."""
        return list(self._makers)

    def stage(self, name: str) -> Stage:
        """The stage of a name; needs those before to be done."""
        return self._makers[name]()

    def stages(self) -> Iterator[Stage]:
        """The stages in their order: each must be done when the next one is asked for."""
        return map(self.stage, self.stage_names())

    @cached_property
    def _makers(self) -> dict[str, Callable[[], Stage]]:
        makers = [self.scan, self.fold, self.documents, *self.cleaning.stages(), self.statistics]
        if self.config.tokenizer.existing is None:
            makers.append(self.sample)
        makers += [self.tokenizer, self.tokens]
        found: dict[str, Callable[[], Stage]] = {make.__name__: make for make in makers}
        for length in self.config.max_lengths:
            found[f"plan-{length}"] = partial(self.plan, length)
            found[f"rows-{length}"] = partial(self.rows, length)
        return found

    @cached_property
    def files(self) -> list[DocumentFile]:
        """The files of documents, in the order of the inputs; known once `documents` is done."""
        found = []
        for source in self.inputs:
            stems = [source.stem]
            if source.kind in mimic.SOURCES:
                folder = self.out / "documents"
                paths = sorted(folder.glob(f"{source.stem}-*.parquet"))
                stems = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
            found += [DocumentFile(source.source, stem) for stem in stems]
        return found

    def scan(self) -> Stage:
        """What the fold needs to know of each PubMed file."""
        todo = []
        for source, path in zip(self._pubmed, self._scans, strict=True):
            write = partial(tasks.scan, source.path, path)
            todo.append(Task(source.source, (path.name,), write))
        return self._stage("scan", todo)

    def fold(self) -> Stage:
        """Which records of the PubMed files count: a task for a part of the PMIDs."""
        todo = []
        paths = self._folded if self._pubmed else []
        for part, path in enumerate(paths):
            write = partial(tasks.fold, self._scans, part, len(paths), path)
            todo.append(Task("pubmed", (path.name,), write))
        return self._stage("fold", todo)

    def documents(self) -> Stage:
        """The documents of every input."""
        todo = []
        tables = Counter(source.kind for source in self.inputs)
        for source in self.inputs:
            out = self.out / "documents" / source.stem
            # Several tables of one kind are several editions: the same codes again.
            several = tables[source.kind] > 1
            folded = self._folded if source.kind == "pubmed" else []
            above = self._headings if source.kind in codes.KINDS_UNDER_HEADINGS else None
            write = partial(tasks.documents, source, folded, self.config, several, above, out)
            parts = "-*" if source.kind in mimic.SOURCES else ""
            todo.append(Task(source.source, (f"{source.stem}{parts}.parquet",), write))
        return self._stage("documents", todo)

    def warn_of_note_counts(self, documents: list[Counts]) -> None:
        """Log a warning for notes that are not as many as published; `documents` are its counts."""
        notes: Counter[str] = Counter()
        for source, counts in zip(self.inputs, documents, strict=True):
            if source.kind in mimic.SOURCES:
                notes[source.kind] += counts["records"]
        for name, count in notes.items():
            problem = mimic.count_problem(name, count)
            if problem:
                _LOG.warning("warning: %s", problem)

    def require_documents(self) -> None:
        """Raise InputError when nothing is there to train on."""
        for file in self.files:
            if next(read_documents(self._kept(TRAIN, file)), None) is not None:
                return
        raise InputError(
            f"{self.config.raw_dir}: the inputs hold no document with text to train on; see the "
            f"counts in {self.out / 'kept' / 'summary.json'}"
        )

    def statistics(self) -> Stage:
        """What the data card says of the kept documents."""
        todo = []
        for split in SPLITS:
            for file in self.files:
                name = f"{split}/{file.stem}.json"
                out = self.out / "statistics" / name
                write = partial(write_statistics, self._kept(split, file), out)
                todo.append(Task(f"{split}/{file.source}", (name,), write))
        return self._stage("statistics", todo)

    def sample(self) -> Stage:
        """The documents that a tokenizer may be trained on, from each file."""
        kept = summed_counts(self.out, "kept")
        bytes_of = {source: counts["train_bytes"] for source, counts in kept.items()}
        trained = self.config.tokenizer
        shares = share_to_draw(trained.sample_bytes, trained.shares, bytes_of)
        todo = []
        for file, out in zip(self.files, self._samples, strict=True):
            share = shares[file.source]
            write = partial(tasks.sample, self._kept(TRAIN, file), share, self.config.seed, out)
            todo.append(Task(file.source, (f"{file.stem}.parquet",), write))
        return self._stage("sample", todo)

    def tokenizer(self) -> Stage:
        """The tokenizer: trained, or the existing one copied."""
        trained = self.config.tokenizer
        write = partial(
            tasks.tokenizer, trained.existing, self._samples, self.tokenizer_folder, self.config
        )
        files = ("tokenizer.json", "tokenizer_config.json")
        return self._stage("tokenizer", [Task("tokenizer", files, write)])

    def tokens(self) -> Stage:
        """The token ids of the kept documents."""
        todo = []
        for split in SPLITS:
            for file in self.files:
                folder = f"{split}/{file.stem}"
                write = partial(
                    tasks.tokens,
                    self._kept(split, file),
                    self.tokenizer_folder,
                    self.out / "tokens" / folder,
                )
                outputs = tuple(f"{folder}/{name}" for name in TOKEN_FILES)
                todo.append(Task(f"{split}/{file.source}", outputs, write))
        return self._stage("tokens", todo)

    def plan(self, length: int) -> Stage:
        """Which pieces of which documents share a row: a task for a part of a split and source."""
        shape = RowShape(self.config.row_tokens, length, self.config.max_documents)
        todo = []
        for part, files in self._parts.items():
            name = "/".join(part)
            key = derive_key("packing", self.config.seed, *part)
            folders = self._plans(length, part)
            for number, folder in enumerate(folders):
                write = partial(write_plan, folder, files, shape, key, number, len(folders))
                outputs = tuple(f"{name}/{folder.name}/{file}" for file in PLAN_FILES)
                todo.append(Task(name, outputs, write))
        return self._stage(f"plan-{length}", todo)

    def rows(self, length: int) -> Stage:
        """The shards; needs the plan."""
        ids = self._description["special_ids"]
        tokens = RowTokens(ids["cls"], ids["sep"], ids["pad"], self._dtype)
        size = self.config.rows_per_shard
        todo = []
        for part, files in self._parts.items():
            plans = self._plans(length, part)
            total = sum(map(rows_in, plans))
            split, source = part
            # With that of the plan's own order, or rows would lie where their documents do.
            key = derive_key("row order", self.config.seed, length, *part)
            for number, first in enumerate(range(0, total, size)):
                path = self.out / f"rows-{length}" / shard_name(source, split, number)
                rows = range(first, min(first + size, total))
                write = partial(
                    tasks.shard, path, plans, files, rows, part, self.config.row_tokens, tokens, key
                )
                outputs = (path.name, index_path_of(path).name)
                todo.append(Task(f"{split}/{source}", outputs, write))
        return self._stage(f"rows-{length}", todo)

    def write_manifest(self, length: int, shards: list[Counts]) -> dict[str, Any]:
        """Make the rows of `length` a data set; `shards` are the counts of all tasks of `rows`."""
        stage = self.rows(length)
        entries: dict[Part, list[dict[str, Any]]] = {part: [] for part in self._parts}
        for task, entry in zip(stage.tasks, shards, strict=True):
            split, source = task.group.split("/")
            entries[split, source].append(entry)
        inputs = [source.description() for source in self._all_inputs]
        inputs += [file.description() for file in self.evaluation_inputs]
        file_sha256 = file_hash(self.tokenizer_folder / TOKENIZER_FILE)
        tokenizer = self._description | {"file_sha256": file_sha256}
        return write_manifest(
            stage.folder, self.config, length, tokenizer, inputs, entries, self._parts
        )

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer of the data sets is."""
        return self.out / "tokenizer"

    def _stage(self, name: str, todo: list[Task]) -> Stage:
        return Stage(self.out, name, self.keys[name], todo)

    @property
    def _pubmed(self) -> list[Input]:
        return [source for source in self.inputs if source.source == "pubmed"]

    @property
    def _headings(self) -> Path | None:
        """The file with ICD-10-CM's chapters and blocks, if there is one."""
        paths = (source.path for source in self._all_inputs if source.kind == codes.HEADINGS)
        return next(paths, None)

    @property
    def _scans(self) -> list[Path]:
        return [self.out / "scan" / f"{number:05d}.npz" for number in range(len(self._pubmed))]

    @property
    def _folded(self) -> list[Path]:
        records = summed_counts(self.out, "scan")["pubmed"]["records"]
        parts = -(-records // tasks.FOLD_RECORDS) or 1
        return [self.out / "fold" / f"{part:05d}.npy" for part in range(parts)]

    @property
    def _samples(self) -> list[Path]:
        return [self.out / "sample" / f"{file.stem}.parquet" for file in self.files]

    def _kept(self, split: str, file: DocumentFile) -> Path:
        return self.out / "kept" / split / f"{file.stem}.parquet"

    def _plans(self, length: int, part: Part) -> list[Path]:
        folder = self.out / f"plan-{length}" / "/".join(part)
        number = plan_parts(self._parts[part], self.config.plan_documents)
        return [folder / f"{part:05d}" for part in range(number)]

    @cached_property
    def _description(self) -> dict[str, Any]:
        return tasks.load_tokenizer(self.tokenizer_folder)[1]

    @property
    def _dtype(self) -> np.dtype[Any]:
        return token_dtype(self._description["vocab_size"])

    @cached_property
    def _parts(self) -> dict[Part, list[TokenFile]]:
        """The token files of every split and source that has a document."""
        parts: dict[Part, list[TokenFile]] = {}
        for split in SPLITS:
            for file in self.files:
                tokens = TokenFile(self.out / "tokens" / split / file.stem, self._dtype)
                parts.setdefault((split, file.source), []).append(tokens)
        return {part: files for part, files in parts.items() if any(len(file) for file in files)}


@lru_cache(maxsize=1)
def _pipeline_of_run(out_dir: Path, name: str) -> Pipeline:
    """Kept because a process works on several stages of a run."""
    return Pipeline(read_run(out_dir, name))
