"""The stages between documents and the documents that are kept.

    evaluation  runs of words and PMIDs of the evaluation sets   evaluation/index.npz
    checks      who breaks a rule or overlaps with a set         checks/<source>/NNNNN.npy, .jsonl
    digests     what every document says, as hashes              digests/<source>/NNNNN.npy, .groups
    unique      which documents repeat an earlier one            unique/<source>/NNNNN.npy
    signatures  MinHash keys of these                            signatures/<source>/NNNNN.*
    pairs       documents that share a key: a task a band        pairs/<source>/NN.npy
    candidates  which documents are in a pair                    candidates/<source>/NNNNN.npy
    runs        their runs of words                              runs/<source>/NNNNN.*
    verified    pairs that are similar indeed                    verified/<source>/NNNNN.npz
    components  which documents form a cluster                   components/<source>/NNNNN.members
    clusters    what is dropped of every cluster                 clusters/<source>/NNNNN.npy,
                                                                 .parquet, .kept.npz
    split       groups that go to one side together              split/links.npz, <source>.npy
    paragraphs  what notes may have copied                       paragraphs/<source>/NNNNN.records
    copied      which paragraphs they have                       copied/<source>/NNNNN.npy
    kept        the documents that stay, by split                kept/<split>/<source>/NNNNN.parquet

NNNNN is a file of documents, or of unique, pairs, verified, components, clusters and copied a part
of the work on all files of a source. Signatures to verified are for prose only, paragraphs and
copied for notes only; codes are compared exactly. What each step leaves out is in `summary.json` by
number and in checks' `.jsonl`, clusters' `.parquet` and kept's `copied` and `apart/….jsonl` by id.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

from data_prep import cleaning_tasks as tasks
from data_prep import components, copy_forward, dedup, near_duplicates
from data_prep.clusters import NO_TEMPLATES, Templates, write_clusters
from data_prep.config import DataPrep
from data_prep.decontaminate import EvaluationFile, write_index
from data_prep.dedup import PROSE
from data_prep.inputs import DocumentFile, EvaluationInput
from data_prep.mimic import SOURCES as NOTES
from data_prep.minhash import Banding
from data_prep.near_duplicates import SourceFiles, number_of_pairs, source_files
from data_prep.split import SPLITS
from data_prep.stages import Stage, Task, summed_counts

AddKey = Callable[..., None]


def banding_of(config: DataPrep) -> Banding:
    """How documents are compared."""
    near = config.near_duplicates
    return Banding(near.words, near.bands, near.rows)


def add_cleaning_keys(
    config: DataPrep, evaluation_inputs: Sequence[EvaluationInput], add: AddKey
) -> None:
    """Say with `add` (name, *stages it is built on, **settings) what decides each stage."""
    near = config.near_duplicates
    sets = [
        {"name": part.name, "format": part.format, "fields": part.fields}
        for part in config.decontaminate.sets
    ]
    files = [[file.number, file.md5] for file in evaluation_inputs]
    words = config.decontaminate.words
    add("evaluation", sets=sets, files=files, words=words)
    rules_of = {source: asdict(rules) for source in PROSE if (rules := config.quality.of(source))}
    add("checks", "documents", "evaluation", rules=rules_of, drop=config.decontaminate.drop)
    add("digests", "documents")
    add("unique", "digests", "checks", part_digests=dedup.PART_DIGESTS)
    add("signatures", "unique", banding=vars(banding_of(config)))
    add("pairs", "signatures")
    add("candidates", "pairs")
    add("runs", "candidates")
    part_pairs = near_duplicates.PART_PAIRS
    add("verified", "runs", threshold=near.threshold, part_pairs=part_pairs)
    templates = {"groups": near.template_groups, "copies": near.template_copies}
    sizes = {"shard_members": components.SHARD_MEMBERS, "most_shards": components.MOST_SHARDS}
    add("components", "verified", **sizes)
    add("clusters", "components", templates=templates)
    side = {"seed": config.seed, "validation_share": config.validation_share}
    add("split", "clusters", linked_groups=near.linked_groups, **side)
    least = config.copy_forward.minimum_characters
    add("paragraphs", "split", minimum_characters=least)
    add("copied", "paragraphs", part_records=copy_forward.PART_RECORDS)
    add("kept", "copied")


class Cleaning:
    """The stages of one configuration, made by `stage` (name, tasks).

    files: gives the files of documents, in their order, once they are known.
    """

    def __init__(
        self,
        config: DataPrep,
        files: Callable[[], Sequence[DocumentFile]],
        evaluation_inputs: Sequence[EvaluationInput],
        stage: Callable[[str, list[Task]], Stage],
    ) -> None:
        self.config = config
        self.out = config.out_dir
        self._document_files = files
        self._files_of: dict[str, SourceFiles] = {}
        self.evaluation_inputs = evaluation_inputs
        self._stage = stage
        self.banding = banding_of(config)

    def stages(self) -> list[Callable[[], Stage]]:
        """The stages in their order; each can be made once those before are done."""
        return [
            self.evaluation,
            self.checks,
            self.digests,
            self.unique,
            self.signatures,
            self.pairs,
            self.candidates,
            self.runs,
            self.verified,
            self.components,
            self.clusters,
            self.split,
            self.paragraphs,
            self.copied,
            self.kept,
        ]

    def evaluation(self) -> Stage:
        """What the evaluation sets hold: one task."""
        sets = self.config.decontaminate.sets
        files = [
            EvaluationFile(
                file.number, file.path, sets[file.number].format, tuple(sets[file.number].fields)
            )
            for file in self.evaluation_inputs
        ]
        names = [part.name for part in sets]
        words = self.config.decontaminate.words
        write = partial(write_index, files, names, words, self._index)
        return self._stage("evaluation", [Task("sets", (self._index.name,), write)])

    def checks(self) -> Stage:
        """Which documents of each file break a rule or overlap with a set."""
        todo = []
        for source in self._document_files():
            names = tuple(f"{source.stem}.{ending}" for ending in ("npy", "jsonl"))
            out = self.out / "checks" / source.stem
            write = partial(
                tasks.check,
                self._path("documents", source, "parquet"),
                self._index,
                self.config,
                out,
            )
            todo.append(Task(source.source, names, write))
        return self._stage("checks", todo)

    def digests(self) -> Stage:
        """Hashes of what the documents of each file say, and of their groups."""
        todo = []
        for source in self._document_files():
            names = tuple(f"{source.stem}.{ending}" for ending in ("npy", "groups.npy"))
            out = [self.out / "digests" / name for name in names]
            write = partial(tasks.digests, self._path("documents", source, "parquet"), out)
            todo.append(Task(source.source, names, write))
        return self._stage("digests", todo)

    def unique(self) -> Stage:
        """Which documents repeat an earlier one of their source: a task a part of the digests."""
        todo = []
        for source, inputs in self._by_source.items():
            digests, checks = (
                [self._path(stage, found, "npy") for found in inputs]
                for stage in ("digests", "checks")
            )
            outputs = self._copies(source)
            for part, path in enumerate(outputs):
                write = partial(tasks.unique, digests, checks, part, len(outputs), path)
                todo.append(Task(source, (f"{source}/{path.name}",), write))
        return self._stage("unique", todo)

    def signatures(self) -> Stage:
        """MinHash keys of the documents of each file that say something first."""
        todo = []
        for source, inputs in self._prose.items():
            starts = self._files(source).starts
            for found, begin in zip(inputs, starts, strict=True):
                names = tuple(f"{found.stem}.{part}" for part in ("numbers", "words", "keys"))
                out = self.out / "signatures" / found.stem
                write = partial(
                    tasks.signatures,
                    self._path("documents", found, "parquet"),
                    self._path("checks", found, "npy"),
                    self._copies(source),
                    begin,
                    self.banding,
                    out,
                )
                todo.append(Task(source, names, write))
        return self._stage("signatures", todo)

    def pairs(self) -> Stage:
        """Documents of a source that share a key: a task a band."""
        todo = []
        for source in self._prose:
            for band, path in enumerate(self._pairs(source)):
                write = partial(
                    near_duplicates.write_pairs,
                    self._files(source),
                    self.out / "signatures",
                    self.banding,
                    band,
                    path,
                )
                todo.append(Task(source, (f"{source}/{path.name}",), write))
        return self._stage("pairs", todo)

    def candidates(self) -> Stage:
        """Which documents are in a pair: a task a source."""
        todo = []
        for source, inputs in self._prose.items():
            write = partial(
                near_duplicates.write_wanted,
                self._files(source),
                self._pairs(source),
                self.out / "candidates",
            )
            todo.append(Task(source, tuple(f"{found.stem}.npy" for found in inputs), write))
        return self._stage("candidates", todo)

    def runs(self) -> Stage:
        """The runs of words of these documents, file by file."""
        todo = []
        for source, inputs in self._prose.items():
            for found in inputs:
                names = tuple(f"{found.stem}.{part}" for part in ("values", "starts.npy"))
                write = partial(
                    tasks.runs,
                    self._path("documents", found, "parquet"),
                    self._path("candidates", found, "npy"),
                    self.banding.words,
                    self.out / "runs" / found.stem,
                )
                todo.append(Task(source, names, write))
        return self._stage("runs", todo)

    def verified(self) -> Stage:
        """The similarity of every pair: so many tasks a source that each has a bounded part."""
        todo = []
        for source in self._prose:
            outputs = self._verified(source)
            for number, path in enumerate(outputs):
                write = partial(
                    near_duplicates.verify,
                    self._files(source),
                    self._pairs(source),
                    (number, len(outputs)),
                    self.out / "candidates",
                    self.out / "runs",
                    self.config.near_duplicates.threshold,
                    path,
                )
                todo.append(Task(source, (f"{source}/{path.name}",), write))
        return self._stage("verified", todo)

    def components(self) -> Stage:
        """Which documents form a cluster: a task a source."""
        todo = []
        for source in self._by_source:
            write = partial(
                components.write_members,
                self._files(source).documents,
                self._copies(source),
                self._verified(source),
                self.out / "components" / source,
                components.SHARD_MEMBERS,
            )
            todo.append(Task(source, (f"{source}/*.members",), write))
        return self._stage("components", todo)

    def clusters(self) -> Stage:
        """What is dropped of every cluster: a task a shard of a source's clusters."""
        near = self.config.near_duplicates
        templates = Templates(near.template_groups, near.template_copies)
        todo = []
        for source in self._by_source:
            for members in self._members(source):
                write = partial(
                    write_clusters,
                    self._files(source),
                    members,
                    self._copies(source),
                    self.out / "digests",
                    self.out / "documents",
                    self._verified(source),
                    templates if source in self._prose else NO_TEMPLATES,
                    self.out / "clusters" / source / members.stem,
                )
                stem = f"{source}/{members.stem}"
                names = tuple(f"{stem}.{ending}" for ending in ("npy", "parquet", "kept.npz"))
                todo.append(Task(source, names, write))
        return self._stage("clusters", todo)

    def split(self) -> Stage:
        """Which groups go together: one task, because a subject has notes of several sources."""
        kept = {
            source: [path.with_suffix(".kept.npz") for path in self._decisions(source)]
            for source in self._prose
        }
        write = partial(tasks.split, kept, self.config, self.out / "split")
        names = ("links.npz", *(f"{source}.npy" for source in kept))
        return self._stage("split", [Task("groups", names, write)])

    def paragraphs(self) -> Stage:
        """The paragraphs of the notes that stay, as hashes."""
        todo = []
        for source in self._notes:
            starts = self._files(source).starts
            for found, begin in zip(self._by_source[source], starts, strict=True):
                write = partial(
                    tasks.paragraphs,
                    self._path("documents", found, "parquet"),
                    self._stays(found, begin),
                    begin,
                    self.config.copy_forward.minimum_characters,
                    self._path("paragraphs", found, "records"),
                )
                todo.append(Task(source, (f"{found.stem}.records",), write))
        return self._stage("paragraphs", todo)

    def copied(self) -> Stage:
        """Which paragraphs notes have copied from earlier ones: a task a part of the hashes."""
        todo = []
        for source in self._notes:
            outputs = self._copied(source)
            for part, path in enumerate(outputs):
                write = partial(tasks.copied, self._paragraphs(source), part, len(outputs), path)
                todo.append(Task(source, (f"{source}/{path.name}",), write))
        return self._stage("copied", todo)

    def kept(self) -> Stage:
        """The documents that stay, by split."""
        todo = []
        for source, inputs in self._by_source.items():
            starts = self._files(source).starts
            for found, begin in zip(inputs, starts, strict=True):
                names = {split: f"{split}/{found.stem}.parquet" for split in SPLITS}
                names |= {name: f"{name}/{found.stem}.jsonl" for name in ("copied", "apart")}
                copied = self._copied(source) if source in self._notes else []
                write = partial(
                    tasks.keep,
                    self._path("documents", found, "parquet"),
                    self._path("digests", found, "groups.npy"),
                    self._stays(found, begin),
                    copied,
                    begin,
                    {name: self.out / "kept" / path for name, path in names.items()},
                    self.config,
                )
                todo.append(Task(source, tuple(names.values()), write))
        return self._stage("kept", todo)

    @cached_property
    def _by_source(self) -> dict[str, list[DocumentFile]]:
        found: dict[str, list[DocumentFile]] = {}
        for file in self._document_files():
            found.setdefault(file.source, []).append(file)
        return dict(sorted(found.items()))

    @property
    def _prose(self) -> dict[str, list[DocumentFile]]:
        return {source: found for source, found in self._by_source.items() if source in PROSE}

    @property
    def _notes(self) -> list[str]:
        return [source for source in self._by_source if source in NOTES]

    @property
    def _index(self) -> Path:
        return self.out / "evaluation" / "index.npz"

    def _files(self, source: str) -> SourceFiles:
        if source not in self._files_of:
            stems = [found.stem for found in self._by_source[source]]
            self._files_of[source] = source_files(self.out / "checks", stems)
        return self._files_of[source]

    def _copies(self, source: str) -> list[Path]:
        documents = summed_counts(self.out, "digests")[source]["documents"]
        parts = dedup.parts_of(documents, dedup.PART_DIGESTS)
        return self._numbered("unique", source, parts, "npy")

    def _pairs(self, source: str) -> list[Path]:
        return [
            self.out / "pairs" / source / f"{band:02d}.pairs" for band in range(self.banding.bands)
        ]

    def _verified(self, source: str) -> list[Path]:
        if source not in self._prose:
            return []
        parts = -(-number_of_pairs(self._pairs(source)) // near_duplicates.PART_PAIRS) or 1
        return self._numbered("verified", source, parts, "npz")

    def _members(self, source: str) -> list[Path]:
        return sorted((self.out / "components" / source).glob("*.members"))

    def _decisions(self, source: str) -> list[Path]:
        return self._numbered("clusters", source, len(self._members(source)), "npy")

    def _paragraphs(self, source: str) -> list[Path]:
        return [self._path("paragraphs", found, "records") for found in self._by_source[source]]

    def _copied(self, source: str) -> list[Path]:
        parts = copy_forward.parts_of(self._paragraphs(source), copy_forward.PART_RECORDS)
        return self._numbered("copied", source, parts, "npy")

    def _numbered(self, stage: str, source: str, parts: int, ending: str) -> list[Path]:
        return [self.out / stage / source / f"{part:05d}.{ending}" for part in range(parts)]

    def _stays(self, file: DocumentFile, begin: int) -> tasks.Stays:
        left_out = self.out / "split" / f"{file.source}.npy"
        return tasks.Stays(
            self._path("checks", file, "npy"),
            tuple(self._decisions(file.source)),
            left_out if file.source in PROSE else None,
            begin,
        )

    def _path(self, stage: str, file: DocumentFile, ending: str) -> Path:
        return self.out / stage / f"{file.stem}.{ending}"
