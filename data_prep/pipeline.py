"""The stages of data preparation, from raw files to data sets.

    scan       which records PubMed's files hold                 scan/NNNNN.npz
    fold       which of them count (the last version of each)    fold/NNNNN.npy
    documents  one task an input file                            documents/<source>/NNNNN.parquet
    evaluation … kept  what is left out, and the split (`data_prep.cleaning`)
                                                                 kept/<split>/<source>/NNNNN.parquet
    statistics numbers of the kept documents for the data card   statistics/<split>/<source>/…json
    tokenizer  trained on the training documents, or copied      tokenizer/
    tokens     ids of every kept document                        tokens/<split>/<source>/NNNNN/
    plan-L     which documents share a row, for each max_length  plan-L/<split>/<source>/
    rows-L     the data set; its manifest comes last             rows-L/

Every stage is a list of tasks (`data_prep.stages`) that need nothing but the stages before, so that
tasks can run in any order and anywhere, and what is done is not done again.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from common.config import config_to_dict
from common.counter_random import derive_key
from common.files import file_hash, only_user_of, whole_file, write_json
from data_prep import codes, mimic, pubmed
from data_prep import tokenizer as tokenizers
from data_prep.card.statistics import write_statistics
from data_prep.card.terms import ALL_TERMS
from data_prep.cleaning import Cleaning
from data_prep.config import DataPrep, check
from data_prep.document import Document, InputError, read_documents, write_documents
from data_prep.inputs import Input, find_evaluation_inputs, find_inputs
from data_prep.manifest import write_manifest
from data_prep.rows import PLAN_FILES, Part, RowShape, RowTokens, write_plan, write_planned_shard
from data_prep.shard_writer import shard_name, token_dtype
from data_prep.shards import FORMAT_VERSION, TOKENIZER_FILE, index_path_of
from data_prep.split import SPLITS, TRAIN
from data_prep.stages import Counts, Stage, Task, stage_key
from data_prep.token_files import FILES, TokenFile, write_tokens

_LOG = logging.getLogger(__name__)

# Raised when a stage makes something else of the same input; results of an older one are redone.
VERSION = 3


def run(config: DataPrep) -> dict[Path, dict[str, Any]]:
    """Do everything that is not done yet; returns the manifest of each data set by its folder.

    Raises ConfigError for a key and InputError for an input. From the start on, no data set in
    `out_dir` has a manifest unless it is what `config` and the inputs say. FolderInUse, an OSError,
    while another process works in `out_dir`.
    """
    check(config)
    with only_user_of(config.out_dir):
        return _run(config)


def _run(config: DataPrep) -> dict[Path, dict[str, Any]]:
    pipeline = Pipeline(config)
    pipeline.announce_what_is_redone()
    pipeline.withdraw_stale_manifests()
    pipeline.scan().run()
    pipeline.fold().run()
    pipeline.warn_of_note_counts(pipeline.documents().run())
    for stage in pipeline.cleaning.stages():
        stage().run()
    pipeline.require_documents()
    pipeline.statistics().run()
    pipeline.tokenizer().run()
    pipeline.require_one_redaction_token(_load_tokenizer(pipeline.tokenizer_folder)[0])
    pipeline.tokens().run()
    manifests = {}
    for length in config.max_lengths:
        pipeline.plan(length).run()
        rows = pipeline.rows(length)
        shards = rows.run()
        manifests[rows.folder] = pipeline.write_manifest(length, shards)
    return manifests


class Pipeline:
    """The stages of one configuration; the tasks of a stage are known once those before are done.

    Raises ConfigError and InputError for a configuration and inputs that cannot be used.
    """

    def __init__(self, config: DataPrep) -> None:
        check(config)
        self.config = config
        self.out = config.out_dir
        self.inputs = find_inputs(config)
        self._settings: dict[str, dict[str, str]] = {}
        self.evaluation_inputs = find_evaluation_inputs(config)
        self.cleaning = Cleaning(config, self.inputs, self.evaluation_inputs, self._stage)
        self.keys = self._stage_keys()
        if self._existing_tokenizer is not None:
            self.require_one_redaction_token(self._existing_tokenizer)

    def scan(self) -> Stage:
        """What the fold needs to know of each PubMed file."""
        tasks = []
        for number, source in enumerate(self._pubmed):
            name = f"{number:05d}.npz"
            write = partial(_scan, source.path, self.out / "scan" / name)
            tasks.append(Task(source.source, (name,), write))
        return self._stage("scan", tasks)

    def fold(self) -> Stage:
        """Which records of each PubMed file count: one task, because it compares all files."""
        names = [f"{number:05d}" for number in range(len(self._pubmed))]
        scans = [self.out / "scan" / f"{name}.npz" for name in names]
        folded = tuple(f"{name}.npy" for name in names)
        write = partial(_fold, scans, [self.out / "fold" / name for name in folded])
        return self._stage("fold", [Task("pubmed", folded, write)] if names else [])

    def documents(self) -> Stage:
        """The documents of every input."""
        tasks = []
        tables = Counter(source.kind for source in self.inputs)
        for source in self.inputs:
            name = f"{source.stem}.parquet"
            winners = self.out / "fold" / f"{source.number:05d}.npy"
            out = self.out / "documents" / name
            # Several tables of one kind are several editions: the same codes again.
            several = tables[source.kind] > 1
            write = partial(_documents, source, winners, self.config, several, out)
            tasks.append(Task(source.source, (name,), write))
        return self._stage("documents", tasks)

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
        for source in self.inputs:
            if next(read_documents(self._kept(TRAIN, source)), None) is not None:
                return
        raise InputError(
            f"{self.config.raw_dir}: the inputs hold no document with text to train on; see the "
            f"counts in {self.out / 'kept' / 'summary.json'}"
        )

    def statistics(self) -> Stage:
        """What the data card says of the kept documents."""
        tasks = []
        for split in SPLITS:
            for source in self.inputs:
                name = f"{split}/{source.stem}.json"
                write = partial(
                    write_statistics, self._kept(split, source), self.out / "statistics" / name
                )
                tasks.append(Task(f"{split}/{source.source}", (name,), write))
        return self._stage("statistics", tasks)

    def tokenizer(self) -> Stage:
        """The tokenizer: trained, or the existing one copied."""
        train = [self._kept(TRAIN, source) for source in self.inputs]
        write = partial(
            _tokenizer, self._existing_tokenizer, train, self.tokenizer_folder, self.config
        )
        files = ("tokenizer.json", "tokenizer_config.json")
        return self._stage("tokenizer", [Task("tokenizer", files, write)])

    def require_one_redaction_token(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise InputError when `redaction` is several tokens of `tokenizer`."""
        mark = self.config.redaction
        if mark is None:
            return
        # In a vocabulary whose words carry the space before them it is one with the space, too.
        pieces = min(len(ids) for ids in tokenizers.encode(tokenizer, [mark, f" {mark}"]))
        if pieces != 1:
            raise InputError(
                f"redaction = {mark!r} is {pieces} tokens of the tokenizer "
                f"({self.config.tokenizer.existing or self.tokenizer_folder}); choose one "
                "character that notes do not use, such as █, or a word of its vocabulary"
            )

    def tokens(self) -> Stage:
        """The token ids of the kept documents."""
        tasks = []
        for split in SPLITS:
            for source in self.inputs:
                folder = f"{split}/{source.stem}"
                write = partial(
                    _tokens,
                    self._kept(split, source),
                    self.tokenizer_folder,
                    self.out / "tokens" / folder,
                )
                outputs = tuple(f"{folder}/{name}" for name in FILES)
                tasks.append(Task(f"{split}/{source.source}", outputs, write))
        return self._stage("tokens", tasks)

    def plan(self, length: int) -> Stage:
        """Which pieces of which documents share a row: a task a split and source."""
        shape = RowShape(self.config.row_tokens, length, self.config.max_documents)
        tasks = []
        for part, files in self._parts.items():
            name = "/".join(part)
            key = derive_key("packing", self.config.seed, *part)
            write = partial(write_plan, self.out / f"plan-{length}" / name, files, shape, key)
            tasks.append(Task(name, tuple(f"{name}/{file}" for file in PLAN_FILES), write))
        return self._stage(f"plan-{length}", tasks)

    def rows(self, length: int) -> Stage:
        """The shards; needs the plan."""
        ids = self._description["special_ids"]
        tokens = RowTokens(ids["cls"], ids["sep"], ids["pad"], self._dtype)
        size = self.config.rows_per_shard
        tasks = []
        for part, files in self._parts.items():
            plan = self.out / f"plan-{length}" / "/".join(part)
            total = len(np.load(plan / "bounds.npy", mmap_mode="r")) - 1
            split, source = part
            for number, first in enumerate(range(0, total, size)):
                path = self.out / f"rows-{length}" / shard_name(source, split, number)
                rows = range(first, min(first + size, total))
                write = partial(
                    _shard, path, plan, files, rows, part, self.config.row_tokens, tokens
                )
                outputs = (path.name, index_path_of(path).name)
                tasks.append(Task(f"{split}/{source}", outputs, write))
        return self._stage(f"rows-{length}", tasks)

    def write_manifest(self, length: int, shards: list[Counts]) -> dict[str, Any]:
        """Make the rows of `length` a data set; `shards` are the counts of all tasks of `rows`."""
        stage = self.rows(length)
        entries: dict[Part, list[dict[str, Any]]] = {part: [] for part in self._parts}
        for task, entry in zip(stage.tasks, shards, strict=True):
            split, source = task.group.split("/")
            entries[split, source].append(entry)
        inputs = [source.description() for source in self.inputs]
        inputs += [file.description() for file in self.evaluation_inputs]
        file_sha256 = file_hash(self.tokenizer_folder / TOKENIZER_FILE)
        tokenizer = self._description | {"file_sha256": file_sha256}
        return write_manifest(
            stage.folder, self.config, length, tokenizer, inputs, entries, self._parts
        )

    def announce_what_is_redone(self) -> None:
        """Say in a line on stderr which results of earlier runs go, and because of which settings.

        A stage's settings are kept as hashes in `settings.json`, for the next run to compare.
        """
        path = self.out / "settings.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        stale = [name for name in self.keys if self._stage(name, []).is_stale()]
        if stale:
            changed = {
                setting
                for name in stale
                for setting, value in self._settings[name].items()
                if earlier.get(name, {}).get(setting, value) != value
            }
            others = self._lengths[len(self.config.max_lengths) :]
            gone = [f"rows-{length}" for length in others if f"rows-{length}" in stale]
            of_others = {f"{kind}-{length}" for kind in ("plan", "rows") for length in others}
            again = [name for name in stale if name not in of_others]
            print(
                f"data_prep: {self.out}: other {', '.join(sorted(changed)) or 'settings'} than "
                f"before; made again: {', '.join(again) or 'nothing'}"
                + (f"; no data set any more: {', '.join(gone)}" if gone else ""),
                file=sys.stderr,
                flush=True,
            )
        write_json(path, earlier | self._settings)

    def withdraw_stale_manifests(self) -> None:
        """Take the manifest from every data set of `out_dir` that would be made otherwise now."""
        for length in self._lengths:
            stage = self._stage(f"rows-{length}", [])
            if stage.is_stale():
                stage.withdraw_manifest()

    def _stage(self, name: str, tasks: list[Task]) -> Stage:
        return Stage(self.out, name, self.keys[name], tasks)

    def _stage_keys(self) -> dict[str, str]:
        """What decides the content of every stage; known before any of them has run."""
        config = self.config
        keys: dict[str, str] = {}

        def add(name: str, *before: str, **settings: Any) -> None:
            built_on = [keys[stage] for stage in before]
            settings |= {"version of data_prep": VERSION}
            keys[name] = stage_key(name, built_on=built_on, **settings)
            self._settings[name] = {key: stage_key(key, of=settings[key]) for key in settings}

        add("scan", inputs=[source.description() for source in self._pubmed])
        add("fold", "scan")
        inputs = [source.description() for source in self.inputs]
        made = {
            "keep_retracted": config.keep_retracted,
            "pubmed": config_to_dict(config.pubmed),
            "redaction": config.redaction,
            "code_templates": sorted(set(config.code_templates)),
        }
        add("documents", "fold", inputs=inputs, **made)
        self.cleaning.add_keys(add)
        add("statistics", "kept", terms=ALL_TERMS)
        if self._existing_tokenizer is not None:
            add("tokenizer", description=tokenizers.describe(self._existing_tokenizer))
        else:
            trained = config.tokenizer
            sample = {"sample_bytes": trained.sample_bytes, "shares": trained.shares}
            add("tokenizer", "kept", seed=config.seed, vocab_size=trained.vocab_size, **sample)
        add("tokens", "kept", "tokenizer")
        for length in self._lengths:
            shape = {"row_tokens": config.row_tokens, "max_documents": config.max_documents}
            add(f"plan-{length}", "tokens", seed=config.seed, max_length=length, **shape)
            size = {"rows_per_shard": config.rows_per_shard, "format": FORMAT_VERSION}
            add(f"rows-{length}", f"plan-{length}", **size)
        return keys

    @property
    def _lengths(self) -> list[int]:
        """The lengths asked for, then those made by earlier runs: they share the tokenizer."""
        folders = (self.out / "completions").glob("rows-*")
        made = {int(folder.name.removeprefix("rows-")) for folder in folders}
        return [*self.config.max_lengths, *sorted(made - set(self.config.max_lengths))]

    @property
    def _pubmed(self) -> list[Input]:
        return [source for source in self.inputs if source.source == "pubmed"]

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer of the data sets is."""
        return self.out / "tokenizer"

    @cached_property
    def _existing_tokenizer(self) -> PreTrainedTokenizerFast | None:
        existing = self.config.tokenizer.existing
        return None if existing is None else tokenizers.load_tokenizer(existing)

    @cached_property
    def _description(self) -> dict[str, Any]:
        return _load_tokenizer(self.tokenizer_folder)[1]

    @property
    def _dtype(self) -> np.dtype[Any]:
        return token_dtype(self._description["vocab_size"])

    @cached_property
    def _parts(self) -> dict[Part, list[TokenFile]]:
        """The token files of every split and source that has a document."""
        parts: dict[Part, list[TokenFile]] = {}
        for split in SPLITS:
            for source in self.inputs:
                file = TokenFile(self.out / "tokens" / split / source.stem, self._dtype)
                parts.setdefault((split, source.source), []).append(file)
        return {part: files for part, files in parts.items() if any(len(file) for file in files)}

    def _documents(self, source: Input) -> Path:
        return self.out / "documents" / f"{source.stem}.parquet"

    def _kept(self, split: str, source: Input) -> Path:
        return self.out / "kept" / split / f"{source.stem}.parquet"


def _scan(path: Path, out: Path) -> Counts:
    scan = pubmed.scan(path)
    with whole_file(out) as file:
        np.savez(file, **vars(scan))
    return {"records": len(scan.pmids), "deletions": len(scan.deleted_pmids)}


def _fold(scans: list[Path], out: list[Path]) -> Counts:
    winners = pubmed.fold(pubmed.Scan(**np.load(path)) for path in scans)
    _save_all(out, winners)
    return {"records": sum(map(len, winners))}


def _documents(
    source: Input, winners: Path, config: DataPrep, edition_in_id: bool, out: Path
) -> Counts:
    counts: Counter[str] = Counter()
    found: Iterator[Document]
    if source.kind == "pubmed":
        found = pubmed.documents(
            source.path,
            np.load(winners),
            keep_retracted=config.keep_retracted,
            **config_to_dict(config.pubmed),
            counts=counts,
        )
    elif source.kind in codes.KINDS:
        found = codes.documents(
            source.path,
            source.kind,
            counts,
            templates=config.code_templates,
            edition_in_id=edition_in_id,
        )
    else:
        found = mimic.documents(source.path, source.kind, counts, redaction=config.redaction)
    counts["documents"] = write_documents(out, found)
    return dict(counts)


def _tokenizer(
    existing: PreTrainedTokenizerFast | None, train: list[Path], out: Path, config: DataPrep
) -> Counts:
    if existing is not None:
        tokenizers.save_tokenizer(existing, out)
    else:
        tokenizers.train_tokenizer(
            (document for path in train for document in read_documents(path)),
            out,
            config.tokenizer.vocab_size,
            sample_bytes=config.tokenizer.sample_bytes,
            shares=config.tokenizer.shares,
            seed=config.seed,
        )
    _load_tokenizer.cache_clear()
    return {"vocabulary": _load_tokenizer(out)[1]["vocab_size"]}


def _tokens(kept: Path, tokenizer_folder: Path, out: Path) -> Counts:
    tokenizer, description = _load_tokenizer(tokenizer_folder)
    vocab_size = description["vocab_size"]
    dtype = token_dtype(vocab_size)
    return dict(write_tokens(out, read_documents(kept), tokenizer, vocab_size, dtype))


def _shard(*arguments: Any) -> Counts:
    return write_planned_shard(*arguments).to_dict()


@cache
def _load_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """The tokenizer and its description, kept because a process tokenises many files."""
    tokenizer = tokenizers.load_tokenizer(folder)
    return tokenizer, tokenizers.describe(tokenizer)


def _save_all(paths: list[Path], arrays: list[Any]) -> None:
    for path, array in zip(paths, arrays, strict=True):
        with whole_file(path) as file:
            np.save(file, array)
