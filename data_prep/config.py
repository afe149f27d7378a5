"""The configuration of data preparation: the `data_prep:` section of a YAML file."""

import re
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from common.config import ConfigError, config, config_to_dict
from data_prep.codes import HEADINGS, KINDS_UNDER_HEADINGS, SOURCE_OF_KIND, TEMPLATES


def _key_of(kind: str) -> str:
    return kind.replace("-", "_")


# The source of the documents of each key of `sources` that is a kind of code table.
CODE_SOURCES = {_key_of(kind): source for kind, source in SOURCE_OF_KIND.items()}


def source_of(key: str) -> str:
    """The source of the documents of a key of `sources`: mostly of the same name."""
    return CODE_SOURCES.get(key, key)


_MOST_ROW_TOKENS = 1 << 20
# Those that a document overlaps with are the bits of a uint64.
_MOST_SETS = 64
# 4 GB of ids for the writer of a shard.
_MOST_SHARD_TOKENS = 1 << 30


@config
class Sources:
    """Per source, patterns of its files below `raw_dir` (`**` is any depth); none leaves it out."""

    pubmed: list[str] = field(default_factory=list)
    """PubMed XML, plain or gzip: baseline, update files, exports"""
    discharge: list[str] = field(default_factory=list)
    """MIMIC-IV-Note's discharge.csv.gz"""
    radiology: list[str] = field(default_factory=list)
    """MIMIC-IV-Note's radiology.csv.gz"""
    icd10cm: list[str] = field(default_factory=list)
    """CMS's ICD-10-CM order file, or the zip with it"""
    icd10cm_tabular: list[str] = field(default_factory=list)
    """CMS's tabular list of ICD-10-CM, or the zip with it: chapters and blocks for the codes of
    icd10cm and d_icd_diagnoses; it is one file and makes no documents"""
    icd9cm_dx: list[str] = field(default_factory=list)
    """CMS's long titles of ICD-9-CM diagnoses, or the zip with them"""
    icd9cm_sg: list[str] = field(default_factory=list)
    """CMS's long titles of ICD-9-CM procedures, or the zip with them"""
    icd10pcs: list[str] = field(default_factory=list)
    """CMS's ICD-10-PCS order file, or the zip with it"""
    hcpcs: list[str] = field(default_factory=list)
    """CMS's alphanumeric HCPCS file (…ANWEB….txt), or the zip with it"""
    d_icd_diagnoses: list[str] = field(default_factory=list)
    """MIMIC-IV's d_icd_diagnoses.csv.gz; this and the next three make the source mimic_codes"""
    d_icd_procedures: list[str] = field(default_factory=list)
    """MIMIC-IV's d_icd_procedures.csv.gz"""
    d_hcpcs: list[str] = field(default_factory=list)
    """MIMIC-IV's d_hcpcs.csv.gz"""
    d_labitems: list[str] = field(default_factory=list)
    """MIMIC-IV's d_labitems.csv.gz"""
    loinc: list[str] = field(default_factory=list)
    """LOINC's Loinc.csv, or the zip of a release"""
    rxnorm: list[str] = field(default_factory=list)
    """RxNorm's RXNCONSO.RRF, or the zip of a release"""
    ndc: list[str] = field(default_factory=list)
    """RxNorm's RXNSAT.RRF for National Drug Codes, or the zip; rxnorm must name the same release"""

    def patterns(self) -> dict[str, list[str]]:
        """The patterns of every key."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@config
class Pubmed:
    """Which documents are made of PubMed's records."""

    languages: list[str] = field(default_factory=lambda: ["en"])
    """ISO 639-1 codes of the languages to keep, told from the text; [] keeps all"""
    other_abstracts: list[str] = field(default_factory=list)
    """types of OtherAbstract, such as plain-language-summary or PIP, that are documents of their
    own; "*" is any"""
    vernacular_titles: bool = False
    """make titles in the article's own language documents of their own"""


@config
class Tokenizer:
    """Trained on the training documents, or an existing one."""

    existing: str | None = None
    """folder of a fast Hugging Face tokenizer, or its name on the hub; none is trained then"""
    vocab_size: int = 50368
    """ids, a multiple of 64"""
    sample_bytes: int = 256 * 2**20
    """bytes of text to train on; training takes some twelve times as much memory"""
    shares: dict[str, float] | None = None
    """source -> its part of the sample; by default sources have the shares they have in the text"""


@config
class Download:
    """Where `python -m data_prep download` fetches from, and how patiently."""

    pubmed: str = "https://ftp.ncbi.nlm.nih.gov/pubmed/"
    """NLM's folder of PubMed files; its subfolders list them"""
    pubmed_parts: list[str] = field(default_factory=lambda: ["baseline", "updatefiles"])
    """the subfolders to fetch"""
    codes: list[str] = field(
        default_factory=lambda: [
            "https://www.cms.gov/files/zip/2026-code-descriptions-tabular-order.zip",
            "https://www.cms.gov/files/zip/2026-code-tables-tabular-and-index.zip",
            "https://www.cms.gov/files/zip/"
            "2026-icd-10-pcs-order-file-long-and-abbreviated-titles.zip",
            "https://www.cms.gov/medicare/coding/icd9providerdiagnosticcodes/downloads/"
            "icd-9-cm-v32-master-descriptions.zip",
            "https://www.cms.gov/files/zip/january-2026-alpha-numeric-hcpcs-file.zip",
        ]
    )
    """the files of code tables"""
    parallel: int = 3
    """files fetched at a time; NLM asks for few connections"""
    tries: int = 8
    """tries in a row without a new byte before a file is given up"""
    wait_s: float = 1.0
    """seconds before the second try; doubled for each further one, up to a minute"""
    timeout_s: float = 60.0
    """seconds without a byte after which a connection counts as cut"""


@config
class QualityRules:
    """What a text of a source must be like; what breaks a rule is left out."""

    minimum_words: int = 1
    """words, runs of letters and digits"""
    minimum_letters: float = 0.3
    """share of letters among the characters that are no white space"""
    maximum_repeated_lines: float = 0.6
    """share of the characters that stand in lines said before; from 50 words on"""
    maximum_repeated_words: float = 0.6
    """share of the runs of 5 words that were there before; from 50 words on"""
    longest_word: int = 1000
    """characters without white space"""
    maximum_unreadable: float = 0.01
    """share of control and replacement characters"""


@config
class Quality:
    """Rules for each source of prose; code descriptions have none, all of them stay."""

    # Titles alone count, but "Reply" and "Book review" do not.
    pubmed: QualityRules = field(
        default_factory=lambda: QualityRules(minimum_words=3, minimum_letters=0.5)
    )
    discharge: QualityRules = field(default_factory=lambda: QualityRules(minimum_words=20))
    # An impression may be "Normal."
    radiology: QualityRules = field(default_factory=QualityRules)

    def of(self, source: str) -> QualityRules | None:
        """The rules of a source, None where it has none."""
        return getattr(self, source, None)


@config
class EvaluationSet:
    """An evaluation set whose texts and articles are left out."""

    name: str
    """what the counts call it"""
    files: list[str]
    """patterns of its files below `raw_dir`"""
    format: Literal["lines", "jsonl", "json_by_pmid", "tokens", "sections", "pubtator", "pmids"]
    """what data_prep/evaluation_texts.py says of each"""
    fields: list[str] = field(default_factory=lambda: ["text"])
    """of jsonl and json_by_pmid, what to read"""


@config
class Decontaminate:
    """Documents that share a run of words or a PMID with an evaluation set."""

    sets: list[EvaluationSet] = field(default_factory=list)
    words: int = 13
    """words of a run"""
    drop: bool = True
    """leave such documents out; otherwise they are counted only"""


@config
class NearDuplicates:
    """Documents of a source of prose that are nearly the same (data_prep/near_duplicates.py)."""

    threshold: float = 0.8
    """Jaccard similarity from which on they are"""
    words: int = 5
    """words of the runs that are compared"""
    bands: int = 14
    """MinHash: one shared band makes two documents candidates"""
    rows: int = 8
    """hash functions of a band; at 14 x 8 candidates are found with probability 0.92 at 0.8"""
    template_groups: int = 100
    """a text in so many groups (subjects, articles) is a template"""
    template_copies: int = 10
    """copies of a template that stay, at most one a group"""
    linked_groups: int = 100
    """most groups that near-duplicates may tie to one side of the split"""


@config
class CopyForward:
    """Paragraphs that a subject's note repeats from an earlier one."""

    minimum_characters: int = 100
    """of a paragraph that is dropped, white space not counted"""


def _check_time(time: object) -> str:
    if not isinstance(time, str):
        # To YAML 24:00:00 is a number of seconds, and 90, minutes to SLURM, is another.
        raise ValueError(
            f"time has been read as {time!r}; quote it: time: '24:00:00', or on the command line "
            "\"slurm.time='24:00:00'\""
        )
    sixty = r"[0-5]?\d"
    forms = rf"\d+(:{sixty}){{0,2}}|\d+-\d{{1,2}}(:{sixty}){{0,2}}|UNLIMITED|INFINITE"
    if not re.fullmatch(forms, time):
        raise ValueError(
            f"time is {time!r}; SLURM's forms are minutes, minutes:seconds, "
            "hours:minutes:seconds, and days-hours with :minutes and :seconds behind"
        )
    return time


@config
class Slurm:
    """What the jobs of `executor: slurm` ask for; each array does the tasks of a stage."""

    partition: str | None = None
    """null: the cluster's default"""
    time: Annotated[str, BeforeValidator(_check_time)] = "12:00:00"
    """of one job, in SLURM's form, quoted"""
    cpus_per_task: int = 1
    """a task is one process; only tokenising uses more cores"""
    mem_per_cpu_gb: int = 4
    """a task needs some 2; docs/data.md says what decides it"""
    tasks_per_job: int = 1
    """tasks that a job of the array does one after another"""
    options: dict[str, str] = field(default_factory=dict)
    """other options of sbatch without their dashes, such as {account: lab, qos: long}"""


@config
class DataPrep:
    """From raw files to data sets, one for each of `max_lengths`."""

    raw_dir: Path = Path("data/raw")
    """folder of the raw files"""
    out_dir: Path = Path("data/base")
    """folder for everything that is made"""
    sources: Sources = field(default_factory=Sources)
    keep_retracted: bool = False
    """keep retracted PubMed articles and retraction notices"""
    pubmed: Pubmed = field(default_factory=Pubmed)
    redaction: str | None = None
    """what stands in notes for MIMIC's mark of something removed, `___`; it must be one token of
    the tokenizer. null keeps the mark"""
    code_templates: list[str] = field(default_factory=lambda: list(TEMPLATES))
    """the wordings of codes, one of them for each code; data_prep/codes/wording.py has them"""
    quality: Quality = field(default_factory=Quality)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)
    near_duplicates: NearDuplicates = field(default_factory=NearDuplicates)
    copy_forward: CopyForward = field(default_factory=CopyForward)
    validation_share: float = 0.01
    """share of the groups (subjects, articles, code categories) that is held out"""
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    row_tokens: int = 8192
    """tokens of a row, padding included"""
    max_lengths: list[int] = field(default_factory=lambda: [1024])
    """a data set is made for each: tokens of its longest document, [CLS] and [SEP] included"""
    max_documents: int = 512
    """most documents in a row"""
    rows_per_shard: int = 8192
    """rows of a shard; a writer holds so many in memory"""
    plan_documents: int = 1 << 18
    """documents that are packed together; a row holds documents of one such set, drawn at random"""
    part_characters: int = 64 * 2**20
    """characters of notes in a file of documents: a table of notes is many tasks"""
    executor: Literal["local", "slurm"] = "local"
    """who runs the tasks: this machine, or a SLURM cluster (slurm/preprocess.sh)"""
    workers: int | None = 1
    """tasks at a time; null: one a core, on SLURM as many as it gives"""
    slurm: Slurm = field(default_factory=Slurm)
    download: Download = field(default_factory=Download)
    seed: int = 0
    """of the split, the tokenizer's sample and the order of documents and rows"""


def check(run: DataPrep) -> None:
    """Refuse, with a ConfigError that names the key, values that do not fit."""
    positive = {
        "row_tokens": run.row_tokens,
        "max_documents": run.max_documents,
        "rows_per_shard": run.rows_per_shard,
        "tokenizer.sample_bytes": run.tokenizer.sample_bytes,
        "decontaminate.words": run.decontaminate.words,
        "copy_forward.minimum_characters": run.copy_forward.minimum_characters,
        "plan_documents": run.plan_documents,
        "part_characters": run.part_characters,
        "workers": 1 if run.workers is None else run.workers,
        "slurm.cpus_per_task": run.slurm.cpus_per_task,
        "slurm.mem_per_cpu_gb": run.slurm.mem_per_cpu_gb,
        "slurm.tasks_per_job": run.slurm.tasks_per_job,
    }
    near = run.near_duplicates
    for part in ("words", "bands", "rows", "template_groups", "template_copies", "linked_groups"):
        positive[f"near_duplicates.{part}"] = getattr(near, part)
    for key, value in positive.items():
        _require(value > 0, f"{key} is {value}; it must be positive")
    _require(
        run.row_tokens <= _MOST_ROW_TOKENS,
        f"row_tokens is {run.row_tokens}; it must be at most {_MOST_ROW_TOKENS}",
    )
    _require(
        run.row_tokens * run.rows_per_shard <= _MOST_SHARD_TOKENS,
        f"rows_per_shard is {run.rows_per_shard}: shards of {run.row_tokens * run.rows_per_shard} "
        f"tokens, which a writer holds in memory; it must be at most "
        f"{_MOST_SHARD_TOKENS // run.row_tokens} with row_tokens = {run.row_tokens}",
    )
    _require(
        0 <= run.validation_share < 1,
        f"validation_share is {run.validation_share}; it must be at least 0 and below 1",
    )
    _check_cleaning(run)
    _require(bool(run.max_lengths), "max_lengths is empty; name a length, such as [1024]")
    _require(
        len(set(run.max_lengths)) == len(run.max_lengths),
        f"max_lengths names a length twice: {run.max_lengths}",
    )
    for length in run.max_lengths:
        # A piece holds [CLS], [SEP] and at least one token.
        _require(
            3 <= length <= run.row_tokens,
            f"max_lengths has {length}; a document must fit into a row of row_tokens = "
            f"{run.row_tokens} and has at least 3 tokens",
        )
    for language in run.pubmed.languages:
        _require(
            re.fullmatch("[a-z]{2,3}", language) is not None,
            f"pubmed.languages has {language!r}; give ISO 639 codes such as en, de or zh",
        )
    _require(
        run.redaction is None or run.redaction.strip() == run.redaction != "",
        "redaction must be a text without space round it, or null to keep `___`",
    )
    for template in run.code_templates:
        _require(
            template in TEMPLATES,
            f"code_templates has {template!r}; the templates are {', '.join(TEMPLATES)}",
        )
    _require(bool(run.code_templates), "code_templates is empty; name one, such as paper")
    _require(
        bool(run.sources.rxnorm or not run.sources.ndc),
        "sources.ndc needs sources.rxnorm: the names of the drugs are in RXNCONSO.RRF",
    )
    under = [_key_of(kind) for kind in KINDS_UNDER_HEADINGS]
    _require(
        not run.sources.icd10cm_tabular or any(map(run.sources.patterns().get, under)),
        "sources.icd10cm_tabular names chapters and blocks for the codes of another table; name "
        f"that too: {' or '.join(under)}",
    )
    _check_tokenizer(run)
    _require(
        any(run.sources.patterns().values()),
        "sources names no files; give a source its patterns, as configs/sample.yaml does",
    )


def _check_cleaning(run: DataPrep) -> None:
    threshold = run.near_duplicates.threshold
    _require(
        0 < threshold <= 1,
        f"near_duplicates.threshold is {threshold}; it must be above 0 and at most 1",
    )
    # Runs are hashed with a weight for each place.
    for key, words in (
        ("near_duplicates.words", run.near_duplicates.words),
        ("decontaminate.words", run.decontaminate.words),
    ):
        _require(words <= 64, f"{key} is {words}; it must be 64 at most")
    names = [part.name for part in run.decontaminate.sets]
    _require(
        len(names) <= _MOST_SETS,
        f"decontaminate.sets names {len(names)} sets; at most {_MOST_SETS} are meant",
    )
    for name in names:
        _require(
            names.count(name) == 1,
            f"decontaminate.sets has {name!r} twice; give a set all its files at once",
        )


def _check_tokenizer(run: DataPrep) -> None:
    """What would else be found out only after all documents have been read."""
    size, shares = run.tokenizer.vocab_size, run.tokenizer.shares or {}
    _require(
        size > 0 and size % 64 == 0,
        f"tokenizer.vocab_size is {size}; it must be a multiple of 64, such as "
        f"{max(1, -(-size // 64)) * 64}",
    )
    named = {key for key, found in run.sources.patterns().items() if found}
    sources = {source_of(key) for key in named - {_key_of(HEADINGS)}}
    for source, share in shares.items():
        _require(
            source in sources,
            f"tokenizer.shares names {source!r}; the sources are {', '.join(sorted(sources))}",
        )
        _require(share > 0, f"tokenizer.shares.{source} is {share}; it must be positive")
    _require(
        sum(shares.values()) <= 1 + 1e-9,
        f"tokenizer.shares add up to {sum(shares.values())}; they must be 1 at most",
    )


def describe(run: DataPrep, max_length: int) -> dict[str, object]:
    """What a data set's manifest says of its configuration: all that decides its content.

    Where things lie on this machine does not, nor who does the work, nor the other lengths made
    beside it.
    """
    values = config_to_dict(run)
    for key in ("raw_dir", "out_dir", "max_lengths", "download"):
        del values[key]
    for key in ("executor", "workers", "slurm", "part_characters"):
        del values[key]
    existing = run.tokenizer.existing
    if existing is not None and Path(existing).is_dir():
        values["tokenizer"]["existing"] = Path(existing).resolve().name
    return values | {"max_length": max_length}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
